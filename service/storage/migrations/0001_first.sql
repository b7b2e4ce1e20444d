-- Jobs with their events, datasets, models with their versions and aliases.
-- Times are seconds since 1970 (UTC). Columns named *_json hold JSON.

CREATE TABLE datasets (
    dataset_id TEXT PRIMARY KEY,
    display_name TEXT NOT NULL,
    digest TEXT NOT NULL UNIQUE,
    create_time_s DOUBLE PRECISION NOT NULL,
    size_bytes BIGINT NOT NULL,
    classes_json TEXT NOT NULL,
    image_count INTEGER NOT NULL,
    summary_json TEXT NOT NULL,
    case_sensitive INTEGER NOT NULL
);
CREATE INDEX datasets_newest ON datasets (create_time_s, dataset_id);

CREATE TABLE jobs (
    -- Begins with the time, so that sorting by it sorts by age.
    job_id TEXT PRIMARY KEY,
    request_id TEXT UNIQUE,
    model TEXT NOT NULL,
    -- No foreign key: a dataset may be deleted once its jobs have ended.
    dataset_id TEXT,
    device TEXT NOT NULL,
    -- As the job works by it.
    request_json TEXT NOT NULL,
    -- As it came, a graft.v1.FineTuneRequest, with inline images as their datasets.
    message BLOB NOT NULL,
    state TEXT NOT NULL
        CHECK (state IN ('QUEUED', 'RUNNING', 'SUCCEEDED', 'FAILED', 'CANCELLED')),
    create_time_s DOUBLE PRECISION NOT NULL,
    start_time_s DOUBLE PRECISION,
    end_time_s DOUBLE PRECISION,
    version BIGINT NOT NULL DEFAULT 0,
    error_reason TEXT,
    error_message TEXT NOT NULL DEFAULT '',
    last_sequence BIGINT NOT NULL DEFAULT 0,
    progress_json TEXT,
    summary_json TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    -- Attempts that ended without a result and through nobody's wish.
    crashes INTEGER NOT NULL DEFAULT 0,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    CHECK ((state = 'SUCCEEDED') = (version > 0)),
    CHECK ((state = 'FAILED') = (error_reason IS NOT NULL)),
    CHECK ((state IN ('SUCCEEDED', 'FAILED', 'CANCELLED')) = (end_time_s IS NOT NULL))
);
CREATE INDEX jobs_by_state ON jobs (state, job_id);
CREATE INDEX jobs_by_model ON jobs (model, job_id);
CREATE INDEX jobs_by_dataset ON jobs (dataset_id, state);

-- The same table as service.domain.TRANSITIONS; a test compares them.
CREATE TRIGGER jobs_legal_transition BEFORE UPDATE OF state ON jobs
WHEN NOT (
    (OLD.state = 'QUEUED' AND NEW.state IN ('RUNNING', 'FAILED', 'CANCELLED'))
    OR (OLD.state = 'RUNNING'
        AND NEW.state IN ('SUCCEEDED', 'FAILED', 'CANCELLED', 'QUEUED'))
)
BEGIN
    SELECT RAISE(ABORT, 'illegal transition of a job');
END;

CREATE TABLE job_events (
    job_id TEXT NOT NULL REFERENCES jobs (job_id) ON DELETE CASCADE,
    sequence BIGINT NOT NULL,
    time_s DOUBLE PRECISION NOT NULL,
    payload_json TEXT NOT NULL,
    PRIMARY KEY (job_id, sequence)
);

CREATE TABLE models (
    name TEXT PRIMARY KEY,
    create_time_s DOUBLE PRECISION NOT NULL,
    -- The highest number ever given, so that none is given twice.
    last_version BIGINT NOT NULL
);

CREATE TABLE versions (
    model TEXT NOT NULL REFERENCES models (name),
    version BIGINT NOT NULL,
    job_id TEXT NOT NULL UNIQUE,
    create_time_s DOUBLE PRECISION NOT NULL,
    manifest_json TEXT NOT NULL,
    head_digest TEXT NOT NULL,
    backbone_digest TEXT NOT NULL,
    artifact_digest TEXT NOT NULL,
    PRIMARY KEY (model, version)
);
CREATE INDEX versions_by_backbone ON versions (backbone_digest);
CREATE INDEX versions_by_head ON versions (head_digest);
CREATE INDEX versions_by_artifact ON versions (artifact_digest);

CREATE TABLE aliases (
    model TEXT NOT NULL,
    alias TEXT NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (model, alias),
    FOREIGN KEY (model, version) REFERENCES versions (model, version)
);

-- Pretrained backbones in ONNX form; kept when the versions on them are gone.
CREATE TABLE exported_backbones (
    backbone TEXT NOT NULL,
    weights TEXT NOT NULL,
    digest TEXT NOT NULL,
    create_time_s DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (backbone, weights)
);
