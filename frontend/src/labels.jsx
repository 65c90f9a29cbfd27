// What users say of heads, kept in a file that others can load.
import { labels, live, overview, selected } from "./state.js";
import { putJson } from "./api.js";
import { save } from "./figures.js";
import { Section } from "./parts.jsx";
import { pick } from "./heads.jsx";
import { useState } from "preact/hooks";

export function Labels() {
  const [name, setName] = useState(""), [note, setNote] = useState(""), [trouble, setTrouble] = useState("");
  const keep = async (next) => {
    setTrouble("");
    try {
      labels.value = live ? (await putJson("/api/labels", { labels: next })).labels : next;
      return true;
    } catch (error) {
      setTrouble(error.message);
      return false;
    }
  };
  const add = async (event) => {
    event.preventDefault();
    const same = labels.value.find((label) => label.name === name.trim());
    const heads = same ? [...new Set([...same.heads, selected.value])] : [selected.value];
    const rest = labels.value.filter((label) => label !== same);
    if (name.trim() && (await keep([...rest, { name: name.trim(), heads, note: note.trim() || same?.note || "" }]))) { setName(""); setNote(""); }
  };
  const load = async (event) => {
    const input = event.currentTarget, file = input.files[0];
    if (!file) return;
    try {
      const read = JSON.parse(await file.text());
      if (read.fingerprint !== overview.model.fingerprint) throw new Error(`these labels are of another model (${read.fingerprint ?? "none named"}).`);
      await keep([...labels.value.filter((mine) => !read.labels.some((one) => one.name === mine.name)), ...read.labels]);
    } catch (error) {
      setTrouble(error instanceof SyntaxError ? "this file is no JSON." : error.message);
    }
    input.value = "";
  };
  const download = () => save(new Blob([JSON.stringify({ fingerprint: overview.model.fingerprint, version: overview.version, labels: labels.value }, null, 1)], { type: "application/json" }), "labels.json");
  return (
    <Section title="Your labels" about={overview.label_file ? `Kept in ${overview.label_file}.` : "Kept until the page is closed; save them as a file to give them to others."}>
      <form class="label-form" onSubmit={add}>
        <label>Label for {selected.value}<input value={name} maxLength={80} onInput={(event) => setName(event.currentTarget.value)} /></label>
        <label>What you saw<input value={note} maxLength={2000} onInput={(event) => setNote(event.currentTarget.value)} /></label>
        <button type="submit">Add</button>
      </form>
      {trouble ? <p class="failed" role="alert">{trouble}</p> : null}
      <ul class="labels">
        {labels.value.map((label) => (
          <li key={label.name}><b>{label.name}</b> {label.heads.map((head) => <button key={head} type="button" class="chip" onClick={() => pick(head)}>{head}</button>)} {label.note}
            <button type="button" aria-label={`Delete the label ${label.name}`} onClick={() => keep(labels.value.filter((one) => one !== label))}>×</button></li>
        ))}
      </ul>
      <p class="actions">
        {labels.value.length ? <button type="button" onClick={download}>Save as file</button> : null}
        <label class="file">Load a file<input type="file" accept="application/json,.json" onChange={load} /></label>
      </p>
    </Section>
  );
}
