-- Files that tenants registered as backbones; each is stored once by its digest, among
-- the other backbones, whoever has it.

CREATE TABLE registered_backbones (
    tenant TEXT NOT NULL,
    -- As requests name it: onnx/NAME.
    name TEXT NOT NULL,
    -- Of the rewritten file, which serves, and of the one that came.
    digest TEXT NOT NULL,
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
