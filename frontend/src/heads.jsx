// The grid of heads, and the card of the one that was chosen.
import { colouring, desk, labels, live, measured, names, overview, selected, atlas, indexOf } from "./state.js";
import { colourings, current, firstRole, grid, highOf, kindIndex, kinds, otherGrid, saysOf } from "./colourings.js";
import { gradient, kindColour, missing } from "./colours.js";
import { Matrix } from "./matrix.jsx";
import { Bars, JobState, Section } from "./parts.jsx";
import { ask } from "./api.js";
import { chance, number, percent, plusMinus } from "./words.js";
import { useState } from "preact/hooks";

const pick = (name) => {
  selected.value = name;
  try { history.replaceState(null, "", `#${name}`); } catch { /* a notebook's frame has no address */ }
};

function Legend() {
  const one = current.value;
  if (!one) return null;
  if (one.series) {
    const high = highOf(one.series), low = Math.min(0, ...one.series.values.filter((x) => x !== null));
    const threshold = one.series.threshold;
    return (
      <div class="legend">
        <span>{number(low < 0 ? -high : 0)}</span>
        <span class="ramp" style={{ backgroundImage: gradient(low) }} />
        <span>{number(high)} {one.series.unit}</span>
        {threshold !== null && threshold !== undefined ? <span>• reaches {number(threshold)}, where a head counts as found</span> : null}
      </div>
    );
  }
  if (one.labels) return <div class="legend">{labels.value.map((label, i) => <span key={i}><i class="swatch" style={{ background: kindColour(i) }} />{label.name}</span>)}</div>;
  return (
    <div class="legend">
      {kinds.map((kind, i) => <span key={kind.kind}><i class="swatch" style={{ background: kindColour(i) }} />{kind.letter} {kind.title}</span>)}
      <span><i class="swatch" style={{ background: missing() }} />– only rests somewhere (a trait) · silent</span>
    </div>
  );
}

export function Grid() {
  const groups = [...new Set(colourings.value.map((one) => one.group))];
  const values = current.value?.series?.values;
  const best = values ? names.map((name, i) => [name, values[i]]).filter(([, v]) => v !== null).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 8) : [];
  return (
    <Section title="Heads" about="One square is one attention head: layers from top to bottom, heads of a layer from left to right.">
      <label class="field-row">Colour by{" "}
        <select value={current.value?.id ?? ""} onChange={(event) => { colouring.value = event.currentTarget.value; }}>
          {groups.map((group) => (
            <optgroup key={group} label={group}>
              {colourings.value.filter((one) => one.group === group).map((one) => <option key={one.id} value={one.id}>{one.title}</option>)}
            </optgroup>
          ))}
          {groups.length ? null : <option value="">nothing measured yet</option>}
        </select>
      </label>
      <Legend />
      <Matrix matrix={grid.value} chosen={indexOf(selected.value)} choose={(i) => pick(names[i])} label="Grid of heads" name="heads" />
      {otherGrid.value ? <><h3>{overview.atlases[1].name}</h3><Matrix matrix={otherGrid.value} chosen={indexOf(selected.value)} choose={(i) => pick(names[i])} label={`The same heads in ${overview.atlases[1].name}`} name="heads-b" /></> : null}
      {best.length ? <p class="best">Largest: {best.map(([name, value]) => <button key={name} type="button" class="chip" onClick={() => pick(name)}>{name} {number(value)}</button>)}</p> : null}
      {current.value?.series?.formula ? <p class="about">{current.value.series.formula}</p> : null}
      {live ? <Measure /> : null}
    </Section>
  );
}

function Measure() {
  const known = new Set([...(atlas.value?.series ?? []), ...measured.value].map((series) => series.name));
  const open = overview.model.behaviours.filter((one) => !known.has(one.name));
  const [name, setName] = useState(open[0]?.name);
  if (!open.length) return null;
  const run = async () => {
    const behaviour = open.some((one) => one.name === name) ? name : open[0].name;
    const found = await ask({ kind: "measure", behaviour });
    if (found) { measured.value = [...measured.value, found]; colouring.value = `Scores:${found.name}`; }
  };
  return (
    <div class="measure">
      <label class="field-row">Not measured yet{" "}
        <select value={name} onChange={(event) => setName(event.currentTarget.value)}>
          {open.map((one) => <option key={one.name} value={one.name}>{one.title}</option>)}
        </select>
      </label>
      <button type="button" onClick={run}>Measure now</button> <span class="about">Scores only; causal checks are made by <code>manyheads atlas</code>.</span>
      <JobState kind="measure" />
    </div>
  );
}

export function Card() {
  const name = selected.value, i = indexOf(name);
  const all = [...(atlas.value?.series ?? []), ...measured.value];
  const role = firstRole(name);
  const held = atlas.value?.roles[name];
  const checks = (atlas.value?.checks ?? []).filter((check) => check.heads.includes(name));
  return (
    <Section title={name}>
      <p class="says"><i class="swatch" style={{ background: role ? kindColour(kindIndex(role.kind)) : missing() }} />{atlas.value ? saysOf(name) : "No atlas is open; measure behaviours, or ask a prompt."}</p>
      {held?.polysemantic ? <p class="about">It has roles of more than one kind.</p> : null}
      {held?.roles.length ? (
        <table class="plain"><thead><tr><th scope="col">role</th><th scope="col" class="number">score</th><th scope="col" class="number">sure</th><th scope="col" class="number">p</th><th scope="col" class="number">costs alone</th></tr></thead>
          <tbody>{held.roles.map((one) => <tr key={one.behaviour}><th scope="row">{one.behaviour.replaceAll("_", " ")}</th><td class="number">{plusMinus(one.score, one.stderr)}</td><td class="number">{one.confidence === null ? "n/a" : percent(one.confidence)}</td><td class="number">{chance(one.p)}</td><td class="number">{number(one.effect)}</td></tr>)}</tbody></table>
      ) : null}
      {checks.length ? <details><summary>Causal checks it was part of ({checks.length})</summary>
        <div class="wide" tabIndex={0} role="group" aria-label="Causal checks"><table class="plain"><thead><tr><th scope="col">behaviour</th><th scope="col">ablation of</th><th scope="col" class="number">effect</th><th scope="col" class="number">random heads</th><th scope="col" class="number">p</th><th scope="col" class="number">q</th></tr></thead>
          <tbody>{checks.map((check, k) => <tr key={k}><th scope="row">{check.title}, {check.mode}</th><td>{check.heads.join(", ")}</td><td class="number">{plusMinus(check.effect, check.stderr)}</td><td class="number">{plusMinus(check.random, check.spread)}</td><td class="number">{chance(check.p)}</td><td class="number">{chance(check.q)}</td></tr>)}</tbody></table></div></details> : null}
      {all.length ? <details open={!held?.roles.length}><summary>All its scores ({all.length})</summary><div class="wide" tabIndex={0} role="group" aria-label="All scores"><table class="plain"><thead><tr><th scope="col">behaviour</th><th scope="col" class="number">score</th><th scope="col" class="number">counts from</th></tr></thead>
        <tbody>{all.map((series) => <tr key={series.name}><th scope="row">{series.title}</th><td class="number">{plusMinus(series.values[i], series.stderr[i], series.n)}</td><td class="number">{series.threshold === null ? "–" : number(series.threshold)}</td></tr>)}</tbody></table></div></details> : null}
      {live ? <p class="actions">
        <button type="button" onClick={() => { desk.value = { ...desk.value, [name]: desk.value[name] ?? 0 }; document.getElementById("desk")?.scrollIntoView({ block: "nearest" }); }}>Put it on the edit desk</button>
      </p> : null}
    </Section>
  );
}
export { pick, Bars };
