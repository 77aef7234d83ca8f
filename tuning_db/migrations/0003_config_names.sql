-- Config fields and their values have the field's names now: GROUP_HEADS, HEAD_DIM_LAYOUT, SOFTMAX, ROW_STATS, and MASK
-- by when it is applied. `renamed_config` is ours: see memory/old.py. Rows of before read without it; but a config's
-- JSON is part of a row's identity, and a result that is measured again must find the row that it replaces.

UPDATE OR IGNORE measurements SET config_json = renamed_config(config_json)
WHERE renamed_config(config_json) <> config_json;
