-- The identity of a measurement is the program that was measured: a fingerprint of its kernel, and what compiled it.
--
-- Before, it was a hash of the templates that the kernel was rendered from. Rows of then keep that hash, in `templates`,
-- and have no fingerprint. What is no such row, or one of another's once more, stays
-- behind in `results`.

CREATE TABLE measurements (
  -- What the row is about.
  place_json   TEXT NOT NULL,     -- GPU, kernel and bucket, every field in clear
  config_json  TEXT NOT NULL,     -- the choices of the kernel, keys sorted
  gpu          TEXT NOT NULL,     -- the place's gpu and spec.op once more, for listing
  op           TEXT NOT NULL,

  -- The evidence: what was measured, and how.
  kernel       TEXT NOT NULL,     -- fingerprint of the rendered kernel; empty where it is not known
  templates    TEXT NOT NULL,     -- of rows from before fingerprints, the hash of the templates; empty otherwise
  triton       TEXT NOT NULL,     -- its version
  cuda         TEXT NOT NULL,     -- releases of its ptxas; empty where not known
  protocol     INTEGER NOT NULL,  -- version of the timing protocol
  text         TEXT NOT NULL,     -- hash of the kernel's text below its header; empty where it is not known

  -- What came out.
  outcome      TEXT NOT NULL,     -- ok, predicted, or the kind of failure
  shape_json   TEXT,              -- the sizes that were timed
  time_us      REAL,              -- median; of a predicted row, the model's estimate
  time_us_p20  REAL,
  time_us_p80  REAL,
  error        REAL,              -- relative, against the oracle; infinite if the output was not finite
  registers    INTEGER,           -- a thread
  spills       INTEGER,           -- bytes spilled, a thread
  shared_bytes INTEGER,           -- a program
  compile_s    REAL,
  detail       TEXT NOT NULL,     -- why it failed; empty otherwise

  -- Where it comes from.
  created_at   TEXT NOT NULL,     -- ISO 8601, UTC
  source       TEXT NOT NULL,

  PRIMARY KEY (place_json, config_json, kernel, templates, triton, cuda, protocol)
);

CREATE INDEX measurements_by_gpu_and_op ON measurements (gpu, op);

INSERT OR IGNORE INTO measurements (
  rowid, place_json, config_json, gpu, op, kernel, templates, triton, cuda, protocol, text, outcome, shape_json,
  time_us, time_us_p20, time_us_p80, error, registers, spills, shared_bytes, compile_s, detail, created_at, source
)
SELECT
  rowid, json_remove(
    key_json, '$."environment.templates"', '$."environment.triton"', '$."environment.protocol"',
    '$."environment.cuda"', '$."environment.space"'
  ),
  config_json, gpu, op,
  '', json_extract(key_json, '$."environment.templates"'), json_extract(key_json, '$."environment.triton"'),
  ifnull(json_extract(key_json, '$."environment.cuda"'), ''), json_extract(key_json, '$."environment.protocol"'), '',
  outcome, shape_json, time_us, time_us_p20, time_us_p80, error, registers, spills, shared_bytes, compile_s, detail,
  created_at, source
FROM results
WHERE CASE WHEN json_valid(key_json) THEN
  json_type(key_json, '$."environment.templates"') = 'text' AND json_type(key_json, '$."environment.triton"') = 'text'
  AND json_type(key_json, '$."environment.protocol"') = 'integer'
  AND ifnull(json_type(key_json, '$."environment.cuda"'), 'text') = 'text'
  AND ifnull(json_extract(key_json, '$."environment.space"'), 1) = 1
END
ORDER BY rowid;

DELETE FROM results WHERE rowid IN (SELECT rowid FROM measurements);
