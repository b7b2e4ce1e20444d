// Fine-tunes a classifier and asks it, from Node: no generated code, the .proto files as they are.
//
//   npm ci && GOOGLE=... node example.mjs HOST:PORT FOLDER
//
// FOLDER holds a folder of images per class. GOOGLE is a folder that holds
// google/rpc/status.proto, as clients/python/README.md says. GRAFT_TOKEN is sent where it is set.

import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const [address, folder] = process.argv.slice(2);
const PROTO = resolve(dirname(fileURLToPath(import.meta.url)), "../../proto");
const GOOGLE = process.env.GOOGLE;
const CALL_S = 600;

const { graft } = grpc.loadPackageDefinition(
  loader.loadSync(
    ["graft/v1/fine_tuning.proto", "graft/v1/prediction.proto"],
    // Enumerations by name; fields that are not set are left out, but for `optional` and oneofs.
    { includeDirs: [PROTO, GOOGLE], keepCase: true, enums: String, longs: Number, oneofs: true },
  ),
);

const metadata = new grpc.Metadata();
if (process.env.GRAFT_TOKEN) metadata.set("authorization", `Bearer ${process.env.GRAFT_TOKEN}`);
const deadline = () => ({ deadline: Date.now() + CALL_S * 1000 });
const credentials = grpc.credentials.createInsecure();
const tuning = new graft.v1.FineTuningService(address, credentials);
const predicting = new graft.v1.PredictionService(address, credentials);

function call(client, method, request) {
  return new Promise((done, failed) => {
    client[method](request, metadata, deadline(), (error, answer) =>
      error ? failed(error) : done(answer),
    );
  });
}

// What an error carries beside its text: the reason, which programs go by, and more.
const details = new protobuf.Root();
details.resolvePath = (_, name) => join(GOOGLE, name);
details.loadSync(["google/rpc/status.proto", "google/rpc/error_details.proto"]);

function errorInfo(error) {
  const [bytes] = error.metadata.get("grpc-status-details-bin");
  const status = details.lookupType("google.rpc.Status").decode(bytes);
  const name = "google.rpc.ErrorInfo";
  const info = status.details.find((detail) => detail.type_url.endsWith(`/${name}`));
  return details.lookupType(name).decode(info.value);
}

const images = readdirSync(folder).flatMap((label) =>
  readdirSync(join(folder, label)).map((filename) => ({
    label,
    filename,
    content: readFileSync(join(folder, label, filename)),
  })),
);
const { job } = await call(tuning, "FineTune", {
  model: "from-node",
  inline_images: { images },
  feature_based: {},
});

const events = tuning.WatchJob({ job_id: job.job_id }, metadata, deadline());
for await (const { event } of events) {
  if (event.state_change) console.log(event.sequence, event.state_change.state);
}

const { answers } = await call(predicting, "Predict", {
  models: [{ model: "from-node" }],
  images: [{ encoded: images[0].content }, { encoded: Buffer.from("no image") }],
});
const [good, bad] = answers[0].results;
console.log("answer", good.classification.scores[0].label);
console.log("no image", bad.error.message);

try {
  await call(predicting, "Predict", {
    models: [{ model: "nobody" }],
    images: [{ encoded: images[0].content }],
  });
} catch (error) {
  console.log("refused", grpc.status[error.code], errorInfo(error).reason);
}
