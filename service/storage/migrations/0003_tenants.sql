-- Whose datasets, jobs and models are, what versions take on disk, and aliases
-- that fall back. What was there before is the tenant's that needs no name.

ALTER TABLE datasets ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
DROP INDEX datasets_newest;
CREATE INDEX datasets_newest ON datasets (tenant, create_time_s, dataset_id);

ALTER TABLE jobs ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
CREATE INDEX jobs_by_tenant ON jobs (tenant, job_id);
CREATE INDEX jobs_open_by_tenant ON jobs (tenant, state);

ALTER TABLE models ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
CREATE INDEX models_by_tenant ON models (tenant, name);

-- What publishing added on disk: its own files, and its backbone where that is new.
ALTER TABLE versions ADD COLUMN size_bytes BIGINT NOT NULL DEFAULT 0;
-- Read without a look at the rows, whose manifests are long.
CREATE INDEX versions_sizes ON versions (model, version, size_bytes);

-- Whether calls by the alias are answered by where it pointed before when the
-- version that it points to is damaged; of `latest` that holds anyway.
ALTER TABLE aliases ADD COLUMN falls_back INTEGER NOT NULL DEFAULT 0;
