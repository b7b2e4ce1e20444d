-- Whose datasets, jobs and models are, what versions and jobs take on disk, and
-- aliases that fall back. What was there before is the tenant's that needs no name.

ALTER TABLE datasets ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
DROP INDEX datasets_newest;
CREATE INDEX datasets_newest ON datasets (tenant, create_time_s, dataset_id);

ALTER TABLE jobs ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
CREATE INDEX jobs_by_tenant ON jobs (tenant, job_id);
CREATE INDEX jobs_open_by_tenant ON jobs (tenant, state);
-- Whose turn it is: who started a job the longest ago.
CREATE INDEX jobs_started_by_tenant ON jobs (tenant, start_time_s);

ALTER TABLE models ADD COLUMN tenant TEXT NOT NULL DEFAULT 'default';
CREATE INDEX models_by_tenant ON models (tenant, name);

-- What a version's own files take, and its backbone: 0 for one that all share, and
-- what several versions of a tenant share counts once.
ALTER TABLE versions ADD COLUMN size_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE versions ADD COLUMN backbone_bytes BIGINT NOT NULL DEFAULT 0;
-- Read without a look at the rows, whose manifests are long.
CREATE INDEX versions_sizes
    ON versions (model, version, size_bytes, backbone_digest, backbone_bytes);

-- What a tenant's jobs take in here, about; nobody can delete them.
CREATE TABLE job_bytes (
    tenant TEXT PRIMARY KEY,
    size_bytes BIGINT NOT NULL
);
INSERT INTO job_bytes
    SELECT tenant, SUM(LENGTH(CAST(request_json AS BLOB)) + LENGTH(message) + 1024)
    FROM jobs GROUP BY tenant;

-- Whether calls by the alias are answered by where it pointed before when the
-- version that it points to is damaged; of `latest` that holds anyway.
ALTER TABLE aliases ADD COLUMN falls_back INTEGER NOT NULL DEFAULT 0;
