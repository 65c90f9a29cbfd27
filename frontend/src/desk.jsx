// The edit desk: heads with a scale each, and what the model then says, beside what it says as it is.
import { asked, atlas, chosenEdits, desk, names, overview, prompt, rewritten, selected, decoded } from "./state.js";
import { ask, postBlob } from "./api.js";
import { save } from "./figures.js";
import { JobState, Next, Section } from "./parts.jsx";
import { number } from "./words.js";
import { signal } from "@preact/signals";

const trouble = signal("");
const put = (head, scale) => { desk.value = { ...desk.value, [head]: scale }; };
const drop = (head) => { const { [head]: _, ...rest } = desk.value; desk.value = rest; };
const taken = () => Object.entries(chosenEdits.value).map(([name, strength]) => ({ name, strength }));
const scales = () => Object.entries(desk.value).map(([head, scale]) => ({ head, scale }));

async function download() {
  trouble.value = "";
  try {
    save(await postBlob("/api/recipe", { scales: scales() }), "edit.zip");
  } catch (error) {
    trouble.value = error.message;
  }
}

export function Desk() {
  const onDesk = Object.entries(desk.value);
  const behaviours = (atlas.value?.series ?? []).filter((series) => series.threshold !== null && series.values.some((x) => x >= series.threshold));
  const text = asked.value ?? prompt.value;
  const run = async () => { rewritten.value = await ask({ kind: "edit", prompt: text, scales: scales(), edits: taken(), new_tokens: 24 }); };
  const addAll = (event) => {
    const series = behaviours.find((one) => one.name === event.currentTarget.value);
    if (series) desk.value = { ...desk.value, ...Object.fromEntries(names.filter((_, i) => series.values[i] >= series.threshold).map((name) => [name, 0])) };
    event.currentTarget.value = "";
  };
  return (
    <Section id="desk" title="Edit desk" about="Scale heads: 0 ablates a head, 1 leaves it as it is, up to 3 makes it louder. Nothing is changed for good.">
      <p class="actions">
        <button type="button" onClick={() => put(selected.value, desk.value[selected.value] ?? 0)}>Add {selected.value}</button>
        {behaviours.length ? <label>Add all heads of{" "}<select onChange={addAll}><option value="">…</option>{behaviours.map((one) => <option key={one.name} value={one.name}>{one.title}</option>)}</select></label> : null}
        {onDesk.length ? <button type="button" onClick={() => { desk.value = {}; rewritten.value = null; }}>Clear</button> : null}
      </p>
      <ul class="sliders">
        {onDesk.map(([head, scale]) => (
          <li key={head}>
            <label><span class="name">{head}</span>
              <input type="range" min="0" max="3" step="0.1" value={scale} onInput={(event) => put(head, Number(event.currentTarget.value))} /></label>
            <output>{number(scale, 1)}</output>
            <button type="button" aria-label={`Take ${head} off the desk`} onClick={() => drop(head)}>×</button>
          </li>
        ))}
      </ul>
      <ul class="sliders">
        {(overview.model.edits ?? []).map(({ name, says }) => {
          const strength = chosenEdits.value[name];
          const set = (value) => { const { [name]: _, ...rest } = chosenEdits.value; chosenEdits.value = value === undefined ? rest : { ...rest, [name]: value }; };
          return (
            <li key={name} title={says}>
              <label><input type="checkbox" checked={strength !== undefined} onChange={(event) => set(event.currentTarget.checked ? 1 : undefined)} /> edit <span class="token">{name}</span></label>
              {strength !== undefined ? <><input type="range" aria-label={`Strength of ${name}`} min="0" max="3" step="0.1" value={strength} onInput={(event) => set(Number(event.currentTarget.value))} /><output>{number(strength, 1)}</output></> : null}
            </li>
          );
        })}
      </ul>
      {onDesk.length || taken().length ? (
        <p class="actions">
          <button type="button" class="main" disabled={!text} onClick={run}>Run edited</button>
          {onDesk.length ? <><button type="button" onClick={download}>Download the scales</button>
          <span class="about">then <code>manyheads edit bake {overview.model.name} edit --out edited</code></span></> : null}
        </p>
      ) : null}
      {trouble.value ? <p class="failed" role="alert">{trouble.value}</p> : null}
      <JobState kind="edit" />
      {rewritten.value ? <Beside found={rewritten.value} /> : null}
    </Section>
  );
}

function Beside({ found }) {
  return (
    <>
      <p>The next token's distribution moves by {number(found.shift, 3)} (total variation: 0 is unchanged, 1 is another token altogether).</p>
      <div class="columns">
        {[["as it is", found.before], ["edited", found.after]].map(([title, side]) => (
          <div key={title}>
            <h3>{title}</h3>
            <Next rows={side.next} top={6} label={`next, ${title}`} />
            <blockquote class="written">{side.text}</blockquote>
          </div>
        ))}
      </div>
    </>
  );
}

export function Decoding() {
  const text = asked.value ?? prompt.value, found = decoded.value;
  const run = async () => { decoded.value = await ask({ kind: "decode", prompt: text, new_tokens: 64 }); };
  return (
    <Section title="Decoding" about="Guessing ahead: a drafter proposes tokens, one pass of the model checks them. Tokens of one pass share a colour.">
      <p class="actions"><button type="button" disabled={!text} onClick={run}>Write 64 tokens</button></p>
      <JobState kind="decode" />
      {found ? (
        <>
          <p>{number(found.tokens_a_pass)} tokens a pass, drafted by {found.drafter}. The text is what the model writes without drafting.</p>
          <p class="decoded">{found.passes.map((tokens, i) => <span key={i} class={`pass-${i % 2}`} title={`pass ${i + 1}: ${tokens.length} tokens`}>{tokens.join("")}<sub>{tokens.length > 1 ? tokens.length : ""}</sub></span>)}</p>
        </>
      ) : null}
    </Section>
  );
}
