// The tab with the model's card and examples of calls.

import { needsToken } from "./api.js";
import { count, element } from "./dom.js";

/** Shows the answer of GET /info. */
export function showModel(info) {
  const about = {
    architecture: info.architecture,
    "vocabulary": `${count(info.vocabulary_size)} tokens`,
    "longest text": `${count(info.max_length)} tokens, special tokens included`,
    precision: info.precision,
    "mask token": element("code", {}, info.mask_token),
    "runs on": `${info.backend}, ${info.device}`,
    "mlmkit": info.version,
    fingerprint: element("code", {}, info.fingerprint),
  };
  const parts = [element("h2", {}, info.name), list(about), element("h2", {}, "Calling it"), ...examples(info)];
  if (info.parity) {
    parts.push(
      element("h2", {}, "Parity with the checkpoint"),
      element("p", { class: "note" }, "Measured at export, in nats."),
      list(rows(info.parity)),
    );
  }
  parts.push(element("h2", {}, "Limits"), list(rows(info.limits)));
  if (info.files) {
    const files = Object.entries(info.files).map(([name, hash]) => [name, element("code", {}, hash)]);
    const note = element("p", { class: "note" }, "SHA-256, checked before the server started.");
    parts.push(element("h2", {}, "Files"), note, list(Object.fromEntries(files)));
  }
  return parts;
}

function list(entries) {
  const items = Object.entries(entries).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)),
  );
  return element("dl", { class: "dl" }, ...items);
}

/** Flattens a nested report, with readable names and numbers. */
function rows(report, prefix = "") {
  const flat = {};
  for (const [name, value] of Object.entries(report)) {
    const words = prefix + name.replaceAll("_", " ").replaceAll("log prob", "log-probability");
    if (value !== null && typeof value === "object") Object.assign(flat, rows(value, `${words}, `));
    else flat[words] = figure(name, value);
  }
  return flat;
}

function figure(name, value) {
  if (typeof value !== "number") return value === null ? "none" : String(value);
  if (name.endsWith("agreement")) return `${(100 * value).toFixed(2)} %`;
  if (Number.isInteger(value)) return count(value);
  if (Math.abs(value) < 0.001) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: 5 });
}

function examples(info) {
  const server = new URL(".", document.baseURI).href;
  const text = info.example || `... ${info.mask_token} ...`; // the second is in no language: the model may know any
  const header = needsToken() ? ` \\\n  -H "Authorization: Bearer $MLMKIT_TOKEN"` : "";
  const curl = `curl ${server}fill-mask \\
  -H "Content-Type: application/json"${header} \\
  -d ${shellQuoted(JSON.stringify({ inputs: text, parameters: { top_k: 5 } }))}`;
  const python = `${needsToken() ? "import os\n\n" : ""}from huggingface_hub import InferenceClient

client = InferenceClient("${server}fill-mask"${needsToken() ? ', token=os.environ["MLMKIT_TOKEN"]' : ""})
client.fill_mask(${JSON.stringify(text)}, top_k=5)`;
  const reference = element("a", { href: "docs" }, "the API's reference");
  const more = element("p", { class: "note" }, "Every endpoint: ", reference, ".");
  return [code("curl", curl), code("Python", python), more];
}

const shellQuoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

function code(name, text) {
  const block = element("pre", { tabindex: "0", "aria-label": name }, element("code", {}, text));
  if (!navigator.clipboard) return element("div", { class: "code" }, block); // browsers offer it only on secure connections
  const copy = element("button", { type: "button", "aria-label": `Copy the ${name} example` }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return element("div", { class: "code" }, block, copy);
}
