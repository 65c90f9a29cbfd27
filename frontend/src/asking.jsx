// The prompt: what comes next, which heads made it, where the chosen head looks, and why.
import { asked, atlas, carried, clearAnswers, colouring, explained, live, overview, pattern, predicted, promoted, prompt, selected, why } from "./state.js";
import { ask } from "./api.js";
import { Bars, JobState, Next, Section } from "./parts.jsx";
import { Matrix } from "./matrix.jsx";
import { pick } from "./heads.jsx";
import { valueColour, inkOn } from "./colours.js";
import { number, percent } from "./words.js";
import { effect } from "@preact/signals";

export async function run(text = prompt.value) {
  if (!text) return;
  clearAnswers();
  asked.value = text;
  const next = await ask({ kind: "predict", prompt: text });
  if (!next || asked.value !== text) return;
  predicted.value = next;
  look();
  await explain();
}

async function explain(answer = null, against = null) {
  const text = asked.value;
  const found = await ask({ kind: "explain", prompt: text, answer, against });
  if (found && asked.value === text) {
    explained.value = found;
    colouring.value = "This prompt:answer";
  }
}

async function look() {
  const text = asked.value, head = selected.value;
  if (!live || !text || (pattern.value?.head === head && pattern.value.prompt === text)) return;
  const found = await ask({ kind: "pattern", prompt: text, head });
  if (found && asked.value === text && selected.value === head) {
    pattern.value = { ...found, prompt: text };
    why.value = null;
  }
}
// Another head: its pattern on the same prompt.
effect(() => { if (selected.value && asked.peek()) look(); });

export function Prompt() {
  const press = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(); };
  return (
    <Section title="Ask" about={live ? "What does the model write next, and which heads make it so?" : null}>
      {live ? (
        <form onSubmit={(event) => { event.preventDefault(); run(); }}>
          <label for="prompt">Prompt (up to {overview.model.tokens} tokens)</label>
          <textarea id="prompt" rows="3" value={prompt.value} onInput={(event) => { prompt.value = event.currentTarget.value; }} onKeyDown={press} spellcheck={false} />
          <button type="submit" class="main">Ask</button> <span class="about">or Ctrl+Enter</span>
        </form>
      ) : <Kept />}
      <JobState kind="predict" />
      {predicted.value ? <Answer /> : null}
    </Section>
  );
}

function Kept() {
  const kept = overview.prompts ?? [];
  if (!kept.length) return <p class="about">This page was written without prompts. Run <code>manyheads explore MODEL</code> to ask the model.</p>;
  const show = (i) => {
    const one = kept[i];
    asked.value = one.prompt;
    predicted.value = one.predict;
    explained.value = one.explain;
    colouring.value = one.explain ? "This prompt:answer" : colouring.value;
    pattern.value = one.patterns?.find((p) => p.head === selected.value) ?? one.patterns?.[0] ?? null;
  };
  return (
    <p>{kept.map((one, i) => <button key={i} type="button" class="chip" aria-pressed={asked.value === one.prompt} onClick={() => show(i)}>{one.prompt.slice(0, 80)}</button>)}</p>
  );
}

function Answer() {
  const { tokens, next } = predicted.value, found = explained.value;
  return (
    <>
      <p class="tokens" tabIndex={0} role="group" aria-label="Tokens of the prompt">{tokens.map((token, i) => <span key={i} class="token">{token}</span>)}</p>
      <div class="columns">
        <Next rows={next} choose={live ? (token) => explain(token) : null} chosen={found?.answer} />
        <div>
          <JobState kind="explain" />
          {found ? (
            <>
              <p><b class="token">{found.answer}</b> rather than <b class="token">{found.against}</b>: {number(found.difference)} logits. What each part adds to this difference, the rest held fixed; the parts sum to it.</p>
              <Bars label="part" unit="logits" choose={pick} top={10} rows={[...partsOf(found)]} />
            </>
          ) : null}
        </div>
      </div>
    </>
  );
}

function* partsOf(found) {
  const { heads: perLayer } = overview.model;
  for (let i = 0; i < found.heads.length; i++) yield [`L${Math.floor(i / perLayer)}H${i % perLayer}`, found.heads[i]];
  for (let i = 0; i < found.mlps.length; i++) yield [`M${i}`, found.mlps[i]];
  yield* Object.entries(found.constants);
}

export function Looks() {
  const kept = !live && asked.value ? overview.prompts?.find((one) => one.prompt === asked.value)?.patterns?.find((p) => p.head === selected.value) : null;
  const example = atlas.value?.patterns.find((one) => one.head === selected.value);
  const found = live ? (pattern.value?.head === selected.value ? pattern.value : null) : kept;
  const shown = found ?? example;
  const about = found ? "Rows look at columns: each row is a token, its cells what it attends to." : example ? "An example from the atlas. Rows look at columns." : null;
  return (
    <Section title={`Where ${selected.value} looks`} about={about}>
      <JobState kind="pattern" />
      {shown ? <Pattern shown={shown} asks={found !== null && live} /> : <p class="about">{live ? "Ask a prompt, and its attention pattern is drawn here." : "No pattern of this head was kept on this page."}</p>}
      <JobState kind="why" />
      {why.value?.head === selected.value ? <Why found={why.value} tokens={shown.tokens} /> : null}
      {live && asked.value ? <Promoted /> : null}
      {live && asked.value && overview.model.saes?.includes(layerOf(selected.value)) ? <Features tokens={shown?.tokens} /> : null}
      {live ? <Documents /> : null}
    </Section>
  );
}

function Pattern({ shown, asks }) {
  const n = shown.tokens.length;
  const bytes = Uint8Array.from(atob(shown.weights), (c) => c.charCodeAt(0));
  const rows = bytes.length / n;
  const colour = (i) => (i % n > Math.floor(i / n) && bytes[i] === 0 ? "#8881" : valueColour(bytes[i] / 255, 1));
  const matrix = {
    rows, columns: n, title: `${shown.head}: attention pattern`, rowLabels: rows === n ? shown.tokens : [], columnLabels: [],
    colour, ink: (i) => inkOn(colour(i)), hint: asks ? "Choose a cell to ask why it looks there." : undefined,
    tip: (i) => `${shown.tokens[Math.floor(i / n)]} (${Math.floor(i / n)}) looks at ${shown.tokens[i % n]} (${i % n}): ${number(bytes[i] / 255)} of its attention`,
  };
  const choose = asks ? async (i) => {
    const query = Math.floor(i / n), key = i % n;
    why.value = await ask({ kind: "why", prompt: asked.value, head: shown.head, query, key });
  } : undefined;
  return <Matrix matrix={{ ...matrix, rowLabels: matrix.rowLabels.map((t) => t.slice(0, 10)) }} chosen={why.value?.head === shown.head ? why.value.query * n + why.value.key : null} choose={choose} label={`Attention pattern of ${shown.head}`} name={`${shown.head}-pattern`} largest={26} least={2} gutter={68} showRows={n <= 60} />;
}

function Why({ found, tokens }) {
  const zip = (values) => found.parts.map((name, i) => [name, values[i]]);
  return (
    <div class="why" aria-label="Why it looks there">
      <h3>Why <span class="token">{tokens[found.query]}</span> ({found.query}) looks at <span class="token">{tokens[found.key]}</span> ({found.key})</h3>
      <p>The score before the softmax is {number(found.score, 3)}{found.bias ? `, ${number(found.bias, 3)} of it for the positions alone` : ""}; it becomes {number(found.weight, 3)} of the attention. It is split over what wrote the query and what wrote the key, and the parts sum to it.</p>
      <div class="columns three">
        <Bars label="query written by" unit="score" rows={zip(found.by_query)} choose={pick} top={8} />
        <Bars label="key written by" unit="score" rows={zip(found.by_key)} choose={pick} top={8} />
        <Bars label="query × key" unit="score" rows={found.pairs.map(([a, b, share]) => [`${a} × ${b}`, share])} top={8} />
      </div>
    </div>
  );
}

function Promoted() {
  const name = selected.value, key = `${name}\n${asked.value}`;
  const found = promoted.value[key];
  const load = async () => {
    const result = await ask({ kind: "promotes", prompt: asked.value, head: name });
    if (result) promoted.value = { ...promoted.value, [key]: result };
  };
  return (
    <div class="promoted">
      {found ? (
        <>
          <h3>What {name} writes when it reads one token (its OV circuit)</h3>
          <div class="wide" tabIndex={0} role="group" aria-label="OV circuit"><table class="plain"><thead><tr><th scope="col">reads</th><th scope="col">raises most</th><th scope="col">lowers most</th><th scope="col" class="number">rank of the token itself</th></tr></thead>
            <tbody>{found.rows.map((row, i) => <tr key={i}><th scope="row" class="token">{row.reads}</th><td>{row.promotes.map((t, k) => <span key={k} class="token">{t}</span>)}</td><td>{row.suppresses.slice(0, 4).map((t, k) => <span key={k} class="token">{t}</span>)}</td><td class="number">{row.rank}</td></tr>)}</tbody></table></div>
        </>
      ) : <button type="button" onClick={load}>What does it write? (OV circuit)</button>}
      <JobState kind="promotes" />
    </div>
  );
}

const layerOf = (name) => Number(/^L(\d+)/.exec(name)[1]);

// What an autoencoder finds in a head on this prompt, and the documents that need it: asked for, since both take time.
function Asked({ kind, store, id, request, button, children }) {
  const found = store.value[id];
  const load = async () => {
    const result = await ask(request);
    if (result) store.value = { ...store.value, [id]: result };
  };
  return (
    <div class="promoted">
      {found ? children(found) : <button type="button" onClick={load}>{button}</button>}
      <JobState kind={kind} />
    </div>
  );
}

function Features({ tokens }) {
  const name = selected.value;
  return (
    <Asked kind="features" store={carried} id={`features ${name}\n${asked.value}`} request={{ kind: "features", prompt: asked.value, head: name }} button="Which features does it carry? (autoencoder)">
      {(found) => (
        <>
          <h3>Features of the autoencoder that {name} carries here</h3>
          {found.rows.length ? null : <p class="about">None is active on this prompt.</p>}
          {found.rows.map((row) => {
            const most = Math.max(1e-9, ...row.activations);
            return (
              <div key={row.feature} class="feature">
                <p><b>{row.feature}</b>, {percent(row.share)} of it in {name}; it raises {row.raises.map((t, i) => <span key={i} class="token">{t}</span>)}</p>
                <p class="tokens" tabIndex={0} role="group" aria-label={`Activation of feature ${row.feature}`}>{(tokens ?? []).map((token, i) => { const back = valueColour(row.activations[i], most); return <span key={i} class="token" style={{ background: back, color: inkOn(back) }} title={number(row.activations[i])}>{token}</span>; })}</p>
              </div>
            );
          })}
        </>
      )}
    </Asked>
  );
}

function Documents() {
  const name = selected.value;
  return (
    <Asked kind="documents" store={carried} id={`documents ${name}`} request={{ kind: "documents", head: name }} button="Which texts need it most?">
      {(found) => (
        <>
          <h3>Texts that need {name} most</h3>
          <p class="about">How much the loss of a text rises, as a share of it, when the head attends to all tokens alike.</p>
          <ol class="documents">{found.rows.map((row, i) => <li key={i}><b>{number(100 * row.score, 2)} %</b> of {number(row.loss)} nats: {row.text}</li>)}</ol>
        </>
      )}
    </Asked>
  );
}
