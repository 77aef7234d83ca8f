
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const root = document.documentElement;

  // Filters: an item is shown if its GPU, its kernels and its words match; a group is shown if one of its items is. An
  // attribute that many items share is on an element around them. Timings without a card's name match every GPU.
  const form = document.getElementById("filters");
  const items = all("[data-item]").map((element) => {
    const [gpu, op, text] = ["gpu", "op", "text"].map((name) => element.closest(`[data-${name}]`)?.dataset[name] ?? "");
    const words = [gpu, op, text, element.dataset.tip, element.textContent].join(" ").toLowerCase();
    return { element, gpu, ops: op.split(" "), words };
  });
  const groups = all("[data-group]").map((element) => ({ element, items: all("[data-item]", element) }));
  const sections = all("[data-section]").map((element) => ({
    items: all("[data-item]", element),
    nothing: element.querySelector(".nothing"),
  }));

  function filter() {
    const { gpu, op, text } = Object.fromEntries(new FormData(form));
    const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const item of items) {
      const matches = (!gpu || !item.gpu || item.gpu === gpu) && (!op || item.ops.includes(op)) &&
        wanted.every((word) => item.words.includes(word));
      item.element.toggleAttribute("hidden", !matches);
    }
    const shown = (item) => !item.hasAttribute("hidden");
    for (const group of groups) group.element.toggleAttribute("hidden", !group.items.some(shown));
    for (const { items: of, nothing } of sections) nothing?.toggleAttribute("hidden", of.some(shown));
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.reset();  // some browsers keep the filters of the page before a reload

  // A link to a kernel opens its section, even if filters hide it.
  function reveal() {
    const target = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
    if (!target) return;
    if (target.closest("[hidden]")) { form.reset(); filter(); }
    const group = target.closest("details");
    if (group) { group.open = true; target.scrollIntoView({ block: "center" }); }
  }
  window.addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    if (event.target.closest("a")?.hash && event.target.closest("a").hash === location.hash) reveal();
  });
  reveal();

  // The theme: the system's or the chosen one. It is stored if the browser allows that for a page opened from disk.
  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  function setTheme(theme) {
    if (theme === "system") delete root.dataset.theme; else root.dataset.theme = theme;
    button.querySelector("span").textContent = theme;
  }
  const storedTheme = { get() { try { return localStorage.getItem("theme"); } catch { return null; } },
    set(theme) { try { localStorage.setItem("theme", theme); } catch { /* not allowed: the choice ends with the page */ } } };
  setTheme(themes.includes(storedTheme.get()) ? storedTheme.get() : "system");
  button.addEventListener("click", () => {
    const theme = themes[(themes.indexOf(root.dataset.theme ?? "system") + 1) % themes.length];
    setTheme(theme);
    storedTheme.set(theme);
  });

  // Tooltips follow the pointer, or appear beside the focused element.
  const tip = document.getElementById("tip");
  function show(element, x, y) {
    tip.textContent = element.dataset.tip;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  }
  document.addEventListener("pointermove", (event) => {
    const element = event.target.closest?.("[data-tip]");
    if (element) show(element, event.clientX, event.clientY); else tip.hidden = true;
  });
  document.addEventListener("focusin", (event) => {
    const element = event.target.closest("[data-tip]");
    if (element?.matches(":focus-visible")) {
      const box = element.getBoundingClientRect();
      show(element, box.left, box.bottom - 10);
    }
  });
  document.addEventListener("focusout", () => { tip.hidden = true; });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  // All sources are compressed together, and unpacked when the user opens the first.
  let unpacked;
  function sources() {
    unpacked ??= (async () => {
      const bytes = Uint8Array.from(atob(document.getElementById("sources").textContent), (c) => c.charCodeAt(0));
      return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
    })();
    return unpacked;
  }
  document.addEventListener("click", async (event) => {
    const opener = event.target.closest("button.source");
    if (!opener) return;
    const row = opener.closest("tr");
    if (row.nextElementSibling?.matches(".code-row")) {
      row.nextElementSibling.remove();
      opener.setAttribute("aria-expanded", "false");
      return;
    }
    opener.setAttribute("aria-expanded", "true");
    const parts = (await sources())[Number(opener.dataset.source)];
    if (row.nextElementSibling?.matches(".code-row")) return;  // clicked twice while it was unpacked
    const pre = document.createElement("pre");
    pre.tabIndex = 0;
    for (let i = 0; i < parts.length; i += 2) {
      const span = document.createElement("span");
      span.className = parts[i];
      span.textContent = parts[i + 1];
      pre.append(span);
    }
    const copy = document.createElement("button");
    copy.type = "button";
    copy.className = "copy";
    copy.textContent = "copy";
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(pre.textContent);
      copy.textContent = "copied";
    });
    const line = document.createElement("tr");
    line.className = "code-row";
    const cell = document.createElement("td");
    cell.colSpan = row.cells.length;
    cell.append(copy, pre);
    line.append(cell);
    row.after(line);
  });
})();
