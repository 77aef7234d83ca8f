-- Which of its place's trials a row was, from 1 in the order in which they ended; NULL where it is not known: in rows of
-- before, and in those imported without a number. The order of rows shows the course of a search only where it ran.

ALTER TABLE measurements ADD COLUMN trial INTEGER;
