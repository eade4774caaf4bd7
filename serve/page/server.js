// The server's routes as the page calls them: with the person's token, and with a sentence for what is refused.

const TOKEN = "dpo_ray.token";
const RETRY_AFTER_S = [0.5, 1, 2, 4, 8];
const AWAY = "The server does not answer. Check that it runs and that you are online, then try again.";

export class Refused extends Error {
  constructor(status, message, waitS = 0) {
    super(message);
    this.status = status; // 0: there was no answer.
    this.waitS = waitS;
  }

  get mayPass() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

// Of this tab alone: it goes when the tab is closed.
export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (text) => sessionStorage.setItem(TOKEN, text),
  forget: () => sessionStorage.removeItem(TOKEN),
};

export async function getJson(path) {
  return answered((await call(path)).json());
}

export async function postJson(path, body, key) {
  return answered((await call(path, { content: JSON.stringify(body), key })).json());
}

// The objects of a stream, as they come.
export async function* postForEvents(path, body, signal) {
  const response = await call(path, { content: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await answered(reader.read());
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const content = block.replace(/^data: /, "");
      if (content !== "[DONE]") yield JSON.parse(content);
    }
  }
}

// What `send` gives; where waiting may help, it is called again, after `warn` has got the reason.
export async function sendAgain(send, warn) {
  for (const waitS of RETRY_AFTER_S) {
    try {
      return await send();
    } catch (error) {
      if (!error.mayPass) throw error;
      warn(error.message);
      await new Promise((done) => setTimeout(done, 1000 * Math.max(waitS, error.waitS)));
    }
  }
  return send();
}

export function refusedAs(status, why = `HTTP status ${status}`, waitS = 0) {
  return new Refused(status, sentence(status, `${why[0].toUpperCase()}${why.slice(1)}.`), waitS);
}

async function call(path, { content, key, signal } = {}) {
  const headers = {};
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  if (content) headers["content-type"] = "application/json";
  if (key) headers["idempotency-key"] = key;
  const method = content ? "POST" : "GET";
  const response = await answered(fetch(path, { method, headers, body: content, signal, cache: "no-store" }));
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw refusedAs(response.status, body.error?.message, Number(response.headers.get("retry-after")));
}

async function answered(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new Refused(0, AWAY) : error;
  }
}

function sentence(status, why) {
  if (status === 401) return token.get() ? "The server does not know this token." : "This server asks for a token.";
  if (status === 403) return `You may not do this. ${why}`;
  if (status === 409) return `This contradicts what is kept. ${why}`;
  if (status === 410) return "These answers are too old to vote on: go to the next prompt.";
  if (status === 429) return `Too many requests for now. ${why}`;
  return status >= 500 ? `The server cannot do this now. ${why}` : why;
}
