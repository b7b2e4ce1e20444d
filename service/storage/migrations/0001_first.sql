-- Jobs with their events, datasets, models with their versions and aliases, backbones; each
-- with its tenant. Times are seconds since 1970 (UTC). Columns named *_json hold JSON.

CREATE TABLE datasets (
    tenant TEXT NOT NULL,
    dataset_id TEXT NOT NULL,
    display_name TEXT NOT NULL,
    -- Of the images, whoever has them.
    digest TEXT NOT NULL,
    create_time_s DOUBLE PRECISION NOT NULL,
    size_bytes BIGINT NOT NULL,
    classes_json TEXT NOT NULL,
    -- Without erased ones, as the figures above.
    image_count INTEGER NOT NULL,
    erased_count INTEGER NOT NULL,
    summary_json TEXT NOT NULL,
    case_sensitive INTEGER NOT NULL,
    -- Has no classes: can be the target of domain adaptation alone.
    is_unlabelled INTEGER NOT NULL,
    -- Its images in order, and where their bytes lie; another one when an image is erased.
    index_digest TEXT NOT NULL REFERENCES blobs (digest),
    PRIMARY KEY (tenant, dataset_id),
    UNIQUE (tenant, digest)
);
CREATE INDEX datasets_newest ON datasets (tenant, create_time_s, dataset_id);
CREATE INDEX datasets_by_index ON datasets (index_digest);

-- Files that hold the bytes of a dataset's images; several datasets may share one.
CREATE TABLE dataset_packs (
    tenant TEXT NOT NULL,
    dataset_id TEXT NOT NULL,
    digest TEXT NOT NULL REFERENCES blobs (digest),
    PRIMARY KEY (tenant, dataset_id, digest),
    FOREIGN KEY (tenant, dataset_id) REFERENCES datasets (tenant, dataset_id) ON DELETE CASCADE
);
CREATE INDEX dataset_packs_by_digest ON dataset_packs (digest);

-- Images that were erased; kept when the dataset is gone, since versions were trained on it.
CREATE TABLE erasures (
    tenant TEXT NOT NULL,
    dataset_id TEXT NOT NULL,
    image_digest TEXT NOT NULL,
    time_s DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (tenant, dataset_id, image_digest)
);

-- One row for each life of a process: an id is random and never given again.
CREATE TABLE replicas (
    replica_id TEXT PRIMARY KEY,
    -- Of the machine, for people.
    name TEXT NOT NULL,
    release TEXT NOT NULL,
    -- By the database's clock.
    lease_until_s DOUBLE PRECISION NOT NULL,
    -- The newest of `changes` that it has heard of.
    applied BIGINT NOT NULL DEFAULT 0,
    is_draining INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE jobs (
    -- Begins with the time, so that sorting by it sorts by age.
    job_id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    -- NULL where the caller gave none.
    request_id TEXT,
    kind TEXT NOT NULL CHECK (kind IN ('fine_tune', 'ranking')),
    -- '' for a ranking.
    model TEXT NOT NULL,
    device TEXT NOT NULL,
    -- As the job works by it.
    request_json TEXT NOT NULL,
    -- As it came, a graft.v1 message of its kind, with inline images as their datasets.
    message BLOB NOT NULL,
    state TEXT NOT NULL
        CHECK (state IN ('QUEUED', 'RUNNING', 'SUCCEEDED', 'FAILED', 'CANCELLED')),
    -- The replica that works on it. With `attempts` it is the fence of every write of a worker.
    -- No foreign key: a replica that is gone is found by its absence.
    owner TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    -- Attempts that ended without a result and through nobody's wish.
    crashes INTEGER NOT NULL DEFAULT 0,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    create_time_s DOUBLE PRECISION NOT NULL,
    start_time_s DOUBLE PRECISION,
    end_time_s DOUBLE PRECISION,
    -- A deferred job is not claimed before this.
    not_before_s DOUBLE PRECISION NOT NULL DEFAULT 0,
    -- When it was deferred first.
    waiting_since_s DOUBLE PRECISION,
    -- Of its newest event, whose number is last_sequence; neither ever goes back.
    last_event_s DOUBLE PRECISION NOT NULL,
    last_sequence BIGINT NOT NULL,
    progress_json TEXT,
    summary_json TEXT,
    version BIGINT NOT NULL DEFAULT 0,
    -- Whether that was a candidate when the job ended.
    is_candidate INTEGER NOT NULL DEFAULT 0,
    -- A ranking's.
    result_json TEXT,
    error_reason TEXT,
    error_message TEXT NOT NULL DEFAULT '',
    -- What counts for the tenant's quota; the events are in it once the job has ended.
    size_bytes BIGINT NOT NULL,
    UNIQUE (tenant, request_id),
    CHECK ((state = 'RUNNING') = (owner IS NOT NULL)),
    CHECK ((state = 'SUCCEEDED' AND kind = 'fine_tune') = (version > 0)),
    CHECK ((state = 'SUCCEEDED' AND kind = 'ranking') = (result_json IS NOT NULL)),
    CHECK ((state = 'FAILED') = (error_reason IS NOT NULL)),
    CHECK ((state IN ('SUCCEEDED', 'FAILED', 'CANCELLED')) = (end_time_s IS NOT NULL))
);
-- Claims and counts are read from it alone.
CREATE INDEX jobs_by_state ON jobs (state, kind, tenant, job_id, not_before_s, device);
CREATE INDEX jobs_by_tenant ON jobs (tenant, job_id);
CREATE INDEX jobs_by_model ON jobs (tenant, model, job_id);
CREATE INDEX jobs_by_end ON jobs (end_time_s, job_id) WHERE end_time_s IS NOT NULL;
CREATE INDEX jobs_sizes ON jobs (tenant, size_bytes);
-- The order in which tenants take turns: who started a job the longest ago.
CREATE INDEX jobs_started_by_tenant ON jobs (tenant, kind, start_time_s);

-- The labels of its request, by which lists are filtered.
CREATE TABLE job_labels (
    job_id TEXT NOT NULL REFERENCES jobs (job_id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (job_id, key)
);
CREATE INDEX job_labels_by_value ON job_labels (key, value, job_id);

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
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    create_time_s DOUBLE PRECISION NOT NULL,
    -- The highest number ever given, so that none is given twice.
    last_version BIGINT NOT NULL,
    PRIMARY KEY (tenant, name)
);

CREATE TABLE versions (
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    version BIGINT NOT NULL,
    job_id TEXT NOT NULL UNIQUE,
    create_time_s DOUBLE PRECISION NOT NULL,
    manifest_digest TEXT NOT NULL REFERENCES blobs (digest),
    head_digest TEXT NOT NULL REFERENCES blobs (digest),
    backbone_digest TEXT NOT NULL REFERENCES blobs (digest),
    answers_digest TEXT NOT NULL REFERENCES blobs (digest),
    report_json_digest TEXT NOT NULL REFERENCES blobs (digest),
    report_html_digest TEXT NOT NULL REFERENCES blobs (digest),
    -- As requests name it.
    backbone TEXT NOT NULL,
    -- How its images become pixels, as in its manifest.
    background TEXT NOT NULL,
    bit_depth INTEGER NOT NULL,
    image_size INTEGER NOT NULL,
    framing TEXT NOT NULL,
    -- As published: what it was compared with may have moved since its manifest was written.
    gate_checks_json TEXT NOT NULL,
    -- Did not pass its gate.
    is_candidate INTEGER NOT NULL,
    -- Images that it was trained or measured on and that were erased from their datasets since.
    erased_images INTEGER NOT NULL DEFAULT 0,
    -- What a version's own files take, and its backbone: 0 for one that all share, and
    -- what several versions of a tenant share counts once.
    size_bytes BIGINT NOT NULL,
    backbone_bytes BIGINT NOT NULL,
    PRIMARY KEY (tenant, model, version),
    FOREIGN KEY (tenant, model) REFERENCES models (tenant, name)
);
CREATE INDEX versions_by_manifest ON versions (manifest_digest);
CREATE INDEX versions_by_head ON versions (head_digest);
CREATE INDEX versions_by_backbone ON versions (backbone_digest);
CREATE INDEX versions_by_answers ON versions (answers_digest);
CREATE INDEX versions_by_report_json ON versions (report_json_digest);
CREATE INDEX versions_by_report_html ON versions (report_html_digest);
-- Sums are read from it alone.
CREATE INDEX versions_sizes ON versions (tenant, backbone_digest, backbone_bytes, size_bytes);

-- What a version was trained on, its base's first.
CREATE TABLE version_sources (
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    version BIGINT NOT NULL,
    position INTEGER NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('source', 'target')),
    -- A dataset, which may be deleted since, or a folder of the server's; the other is ''.
    dataset_id TEXT NOT NULL,
    folder TEXT NOT NULL,
    PRIMARY KEY (tenant, model, version, position),
    FOREIGN KEY (tenant, model, version) REFERENCES versions (tenant, model, version)
        ON DELETE CASCADE
);
CREATE INDEX version_sources_by_dataset ON version_sources (tenant, dataset_id);

-- The labels of the request that made a version, whose job may be deleted.
CREATE TABLE version_labels (
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    version BIGINT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (tenant, model, version, key),
    FOREIGN KEY (tenant, model, version) REFERENCES versions (tenant, model, version)
        ON DELETE CASCADE
);
CREATE INDEX version_labels_by_value ON version_labels (tenant, key, value, model, version);

-- The version of a model that every replica keeps in memory.
CREATE TABLE pins (
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (tenant, model),
    FOREIGN KEY (tenant, model, version) REFERENCES versions (tenant, model, version)
        ON DELETE CASCADE
);

CREATE TABLE aliases (
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    alias TEXT NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (tenant, model, alias),
    FOREIGN KEY (tenant, model, version) REFERENCES versions (tenant, model, version)
);

-- Where each alias pointed; the last move says where it points now.
CREATE TABLE alias_moves (
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    alias TEXT NOT NULL,
    move BIGINT NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (tenant, model, alias, move),
    FOREIGN KEY (tenant, model) REFERENCES models (tenant, name)
);

-- Pretrained backbones in ONNX form; kept when the versions on them are gone.
CREATE TABLE exported_backbones (
    -- '' for a float form, which is everybody's.
    tenant TEXT NOT NULL,
    backbone TEXT NOT NULL,
    weights TEXT NOT NULL,
    digest TEXT NOT NULL REFERENCES blobs (digest),
    -- Of a float form: what PyTorch made of it, for jobs that have no PyTorch.
    reference_digest TEXT REFERENCES blobs (digest),
    create_time_s DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (tenant, backbone, weights)
);
CREATE INDEX exported_backbones_by_digest ON exported_backbones (digest);
CREATE INDEX exported_backbones_by_reference ON exported_backbones (reference_digest);

-- Files that tenants registered as backbones.
CREATE TABLE registered_backbones (
    tenant TEXT NOT NULL,
    -- As requests name it: onnx/NAME.
    name TEXT NOT NULL,
    -- Of the rewritten file, which serves, and of the one that came.
    digest TEXT NOT NULL REFERENCES blobs (digest),
    source_digest TEXT NOT NULL,
    -- How its caller described it: size, mean, std, layout and output.
    asked_json TEXT NOT NULL,
    width INTEGER NOT NULL,
    licence TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    create_time_s DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (tenant, name)
);
CREATE INDEX registered_backbones_by_digest ON registered_backbones (digest);

-- Files by the sha256 of their content, or about to be there: a row comes before its object, and
-- whoever names one has a foreign key to it, by which the collector knows that it is needed.
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY,
    size_bytes BIGINT NOT NULL,
    -- Drawn when the row was written; with the digest it names the object.
    generation TEXT NOT NULL,
    -- When it was put or referenced last.
    touched_s DOUBLE PRECISION NOT NULL,
    -- Since when nothing needs it; NULL for one that is needed or new.
    doomed_s DOUBLE PRECISION
);
CREATE INDEX blobs_doomed ON blobs (doomed_s) WHERE doomed_s IS NOT NULL;

-- What jobs that have not ended work with, and what is not deleted therefore.
CREATE TABLE holds (
    tenant TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('dataset', 'backbone')),
    name TEXT NOT NULL,
    -- A job's id.
    holder TEXT NOT NULL,
    PRIMARY KEY (tenant, kind, name, holder)
);
CREATE INDEX holds_by_holder ON holds (holder);

-- What other replicas must know, numbered by the counter's row, which is locked to the commit.
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);
CREATE TABLE changes (
    position BIGINT PRIMARY KEY,
    time_s DOUBLE PRECISION NOT NULL,
    kind TEXT NOT NULL,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL
);
CREATE INDEX changes_by_time ON changes (time_s);
