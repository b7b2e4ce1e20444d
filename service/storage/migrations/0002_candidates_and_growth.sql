-- Versions that did not pass their gate, where aliases pointed before, datasets
-- without classes, and the datasets that a job needs beside its own.

ALTER TABLE versions ADD COLUMN is_candidate INTEGER NOT NULL DEFAULT 0;

ALTER TABLE datasets ADD COLUMN is_unlabelled INTEGER NOT NULL DEFAULT 0;

-- Where each alias pointed; the last move says where it points now.
CREATE TABLE alias_moves (
    model TEXT NOT NULL REFERENCES models (name),
    alias TEXT NOT NULL,
    move BIGINT NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (model, alias, move)
);

-- Until now publishing alone moved `latest`, from each version to the next.
INSERT INTO alias_moves (model, alias, move, version)
    SELECT model, 'latest', version, version FROM versions;
INSERT INTO alias_moves (model, alias, move, version)
    SELECT model, alias, 1, version FROM aliases WHERE alias <> 'latest';

-- Of the target and of the base; the job's own is in jobs.dataset_id. No
-- foreign key to datasets: one may be deleted once its jobs have ended.
CREATE TABLE job_datasets (
    job_id TEXT NOT NULL REFERENCES jobs (job_id) ON DELETE CASCADE,
    dataset_id TEXT NOT NULL,
    PRIMARY KEY (job_id, dataset_id)
);
CREATE INDEX job_datasets_by_dataset ON job_datasets (dataset_id);
