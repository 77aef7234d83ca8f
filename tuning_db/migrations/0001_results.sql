-- What tuning found: one row a (key, config), failures included.
--
-- A migration is one numbered file. It runs once, inside a transaction, and its number becomes
-- `PRAGMA user_version`; a file that has shipped is never edited, the next change is a further file.

CREATE TABLE results (
  -- What the row is about.
  key_digest   TEXT NOT NULL,  -- of key_json, for looking up
  config_json  TEXT NOT NULL,  -- the choices of the kernel, keys sorted
  key_json     TEXT NOT NULL,  -- every field the time depends on, in clear
  gpu          TEXT NOT NULL,  -- the key's gpu and spec.op once more, for listing
  op           TEXT NOT NULL,

  -- What came out.
  outcome      TEXT NOT NULL,  -- ok, predicted, or the kind of failure
  shape_json   TEXT,           -- the sizes that were timed
  time_us      REAL,           -- median; of a predicted row, the model's estimate
  time_us_p20  REAL,
  time_us_p80  REAL,
  error        REAL,           -- relative, against the oracle; infinite if the output was not finite
  registers    INTEGER,        -- a thread
  spills       INTEGER,        -- bytes spilled, a thread
  shared_bytes INTEGER,        -- a program
  compile_s    REAL,
  detail       TEXT NOT NULL,  -- why it failed; empty otherwise

  -- Where it comes from.
  created_at   TEXT NOT NULL,  -- ISO 8601, UTC
  source       TEXT NOT NULL,

  PRIMARY KEY (key_digest, config_json)
);

CREATE INDEX results_by_gpu_and_op ON results (gpu, op);
