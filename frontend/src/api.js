// Asking the machine: a job is queued, its events are read until it ends. One job per kind; a new one cancels the old.
import { signal } from "@preact/signals";

const token = new URLSearchParams(location.search).get("token") ?? "";
const headers = { "x-manyheads-token": token };
export const jobs = signal({}); // kind -> { id, state, place, step, done, total, sentence }

const put = (kind, how) => { jobs.value = { ...jobs.value, [kind]: how }; };

async function call(method, path, body) {
  const answer = await fetch(path, {
    method,
    headers: body === undefined ? headers : { ...headers, "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!answer.ok) {
    const detail = await answer.json().then((json) => json.detail, () => answer.statusText);
    throw new Error(typeof detail === "string" ? detail : "the explorer refused the request.");
  }
  return answer;
}

export const readJson = (path) => call("GET", path).then((answer) => answer.json());
export const putJson = (path, body) => call("PUT", path, body).then((answer) => answer.json());
export const postBlob = (path, body) => call("POST", path, body).then((answer) => answer.blob());

export async function ask(asked) {
  const { kind } = asked;
  await cancel(kind);
  put(kind, { state: "waiting", place: 0 });
  try {
    const how = await (await call("POST", "/api/jobs", asked)).json();
    put(kind, how);
    return await follow(kind, how.id);
  } catch (error) {
    const sentence = error instanceof TypeError ? "the explorer does not answer; is it still running?" : error.message;
    put(kind, { state: "failed", sentence });
    return null;
  }
}

async function follow(kind, id) {
  const answer = await call("GET", `/api/jobs/${id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return null;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const { result, ...how } = JSON.parse(event.replace(/^data: /, ""));
      if (jobs.value[kind]?.id !== id) return null; // another took its place
      put(kind, how);
      if (how.state === "done") return result;
    }
  }
}

export async function cancel(kind) {
  const how = jobs.value[kind];
  if (!how?.id || !["waiting", "running"].includes(how.state)) return;
  put(kind, { ...how, id: null, state: "cancelled" });
  await call("DELETE", `/api/jobs/${how.id}`).catch(() => null);
}
