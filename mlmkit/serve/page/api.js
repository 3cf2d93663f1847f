// Calls to the server. A newer call aborts an older one to the same path; after a 401 a call waits for the token.

import { find, say } from "./dom.js";

const running = new Map();
let token = stored();
let asked = null;

/**
 * Returns `{data, milliseconds}`, or null: after an error, which the status line shows, or if a newer call began.
 */
export async function ask(path, body, status) {
  const patience = setTimeout(() => say(status, "Asking the model…"), 300);
  try {
    return await call(path, body);
  } catch (error) {
    if (error.name !== "AbortError") say(status, error.message, true);
    return null;
  } finally {
    clearTimeout(patience);
  }
}

/** Whether the server asked for a token. */
export const needsToken = () => token !== "";

async function call(path, body) {
  running.get(path)?.abort();
  const controller = new AbortController();
  running.set(path, controller);
  for (;;) {
    const sent = token;
    const began = performance.now();
    const response = await send(path, body, controller.signal);
    if (response.status === 401) {
      if (sent === token) await askForToken(sent !== "");
      continue;
    }
    if (!response.ok) throw new Error(await explain(response));
    const data = await response.json();
    return { data, milliseconds: performance.now() - began };
  }
}

async function send(path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, signal };
  if (body) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["Content-Type"] = "application/json";
  }
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
}

async function explain(response) {
  let line = `the server answered ${response.status}`;
  try {
    line = (await response.json()).error ?? line;
  } catch {
    // Not our JSON, perhaps a proxy's page: show the status only.
  }
  const seconds = Number(response.headers.get("Retry-After"));
  if (!seconds) return line;
  const reason = response.status === 429 ? "The server is busy just now" : line;
  return `${reason}. Please try again in ${seconds} second${seconds === 1 ? "" : "s"}.`;
}

/** Show one form for all waiting calls. */
function askForToken(refused) {
  find("token-message").textContent = refused ? "The server did not accept this token" : "This server asks for a token";
  asked ??= new Promise((resolve) => {
    const form = find("token-form");
    form.hidden = false;
    find("token").focus();
    form.onsubmit = (event) => {
      event.preventDefault();
      token = find("token").value;
      store(token);
      form.hidden = true;
      form.reset();
      asked = null;
      resolve();
    };
  });
  return asked;
}

// Kept for the life of the browser's tab, or of the page if the browser refuses storage.
function stored() {
  try {
    return sessionStorage.getItem("mlmkit-token") ?? "";
  } catch {
    return "";
  }
}

function store(value) {
  try {
    sessionStorage.setItem("mlmkit-token", value);
  } catch {
    // It is still in memory.
  }
}
