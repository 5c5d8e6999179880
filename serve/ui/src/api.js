// Calls of the server. The token lives in this module and nowhere else.

let token = "";
let askForToken = async () => "";

export class Refused extends Error {
  constructor(error, status) {
    super(error.message ?? `the server answered ${status}`);
    this.reason = error.reason ?? "";
    this.field = error.field ?? "";
    this.status = status;
  }
}

/** Says who is asked for a token when the server wants one: a function of the reason that promises it. */
export function onTokenWanted(ask) {
  let asking = null;
  askForToken = (why) => {
    asking ??= ask(why).finally(() => (asking = null));
    return asking;
  };
}

export async function call(path, { body, signal } = {}) {
  const response = await send(path, { body, signal });
  return response.json();
}

/** The lines of an answer as objects, as they come. */
export async function* lines(path, { body, signal }) {
  const response = await send(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) if (part) yield JSON.parse(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(path, { body, signal }) {
  for (;;) {
    const used = token;
    const headers = { "X-Equipot-Page": "1" };
    if (used) headers.Authorization = `Bearer ${used}`;
    const init = { headers, signal, cache: "no-store", credentials: "omit" };
    if (body !== undefined) {
      init.method = "POST";
      const raw = body instanceof Blob || typeof body === "string";
      init.body = raw ? body : JSON.stringify(body);
      headers["Content-Type"] = raw ? "application/octet-stream" : "application/json";
    }
    let response;
    try {
      response = await fetch(`api/${path}`, init);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused({ message: "the server cannot be reached", reason: "UNREACHABLE" }, 0);
    }
    if (response.ok) return response;
    const text = await response.text();
    let error = {};
    try {
      error = JSON.parse(text).error ?? {};
    } catch {
      // Some proxy's own page.
    }
    if (response.status !== 401) throw new Refused(error, response.status);
    // Another call may have got one meanwhile.
    if (used === token) token = await askForToken(used ? error.message : "");
  }
}
