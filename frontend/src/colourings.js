// What the grid can be coloured by: roles, scores, single ablations, the difference of two atlases, this prompt's answer, training.
import { computed } from "@preact/signals";
import { atlas, colouring, explained, labels, layers, measured, moment, names, overview, perLayer } from "./state.js";
import { inkOn, kindColour, missing, valueColour } from "./colours.js";
import { chance, number, plusMinus } from "./words.js";

const kinds = overview.atlases[0]?.kinds ?? [];
export const kindIndex = (kind) => kinds.findIndex((one) => one.kind === kind);

function ofSeries(series, group, extra = {}) {
  return { id: `${group}:${series.name}`, group, title: series.title, unit: series.unit, series, ...extra };
}

export const colourings = computed(() => {
  const found = [];
  const [a, b] = overview.atlases;
  if (explained.value) {
    const { answer, against, heads } = explained.value;
    const series = { name: "answer", title: `This answer: ${answer} rather than ${against}`, unit: "logits", values: heads, stderr: null, n: 1 };
    found.push(ofSeries(series, "This prompt"));
  }
  if (a && Object.keys(a.roles).length) found.push({ id: "roles", group: "Atlas", title: "Roles", roles: a.roles });
  for (const series of [...(a?.series ?? []), ...measured.value]) found.push(ofSeries(series, "Scores"));
  for (const series of a?.effects ?? []) found.push(ofSeries(series, "Effects"));
  if (b && b.shape.join() === a.shape.join()) {
    for (const one of a.series) {
      const other = b.series.find((series) => series.name === one.name);
      if (other) {
        const less = (x, y) => (x === null || y === null ? null : x - y);
        const values = one.values.map((x, i) => less(x, other.values[i]));
        const stderr = one.stderr.map((x, i) => (x === null || other.stderr[i] === null ? null : Math.hypot(x, other.stderr[i])));
        found.push(ofSeries({ ...one, title: `${one.title}: ${a.name} less ${b.name}`, values, stderr, threshold: null, p: null, q: null }, "Difference"));
      }
    }
  }
  const history = overview.history;
  if (history) {
    for (const series of history.series) {
      const now = series.values[Math.min(moment.value, series.values.length - 1)];
      found.push(ofSeries({ ...series, title: `${series.title}, after ${history.steps[Math.min(moment.value, history.steps.length - 1)]} updates`, values: now, stderr: null, n: 1, high: Math.max(...series.values.flat().filter((x) => x !== null).map(Math.abs)) }, "Training"));
    }
  }
  if (labels.value.length) found.push({ id: "labels", group: "Atlas", title: "Your labels", labels: labels.value });
  return found;
});

export const current = computed(() => colourings.value.find((one) => one.id === colouring.value) ?? colourings.value[0] ?? null);

const labelled = (name) => labels.value.filter((label) => label.heads.includes(name));
const rolesOf = (name) => atlas.value?.roles[name];
export const firstRole = (name) => rolesOf(name)?.roles[0];

export function saysOf(name) {
  const held = rolesOf(name);
  if (!held) return "no role found";
  if (held.silent) return "silent: it writes next to nothing";
  const said = held.roles.map((role) => `${role.behaviour.replaceAll("_", " ")} ${plusMinus(role.score, role.stderr)}`);
  const traits = held.traits.map((role) => `rests: ${role.behaviour.replaceAll("_", " ")}`);
  return [...said, ...traits].join("; ") || "no role found";
}

function tipOf(one, i) {
  const name = names[i], { series } = one;
  const mine = labelled(name).map((label) => ` [${label.name}]`).join("");
  if (!series) return `${name}: ${one.labels ? labelled(name).map((label) => label.name).join(", ") || "no label" : saysOf(name)}${mine}`;
  const stands = series.threshold !== null && series.threshold !== undefined && series.values[i] >= series.threshold ? ", above the threshold" : "";
  const tested = series.p === null || series.p === undefined ? "" : `; its behaviour: p ${chance(series.p)}, q ${chance(series.q)}`;
  const sample = series.n > 1 ? ` (n = ${series.n})` : "";
  return `${name}: ${plusMinus(series.values[i], series.stderr?.[i] ?? null, series.n)} ${series.unit}${sample}${stands}${tested}. ${atlas.value ? saysOf(name) : ""}${mine}`;
}

export const highOf = (series) => series.high ?? Math.max(1e-9, ...series.values.filter((x) => x !== null).map(Math.abs));

export const grid = computed(() => {
  const one = current.value;
  const base = {
    rows: layers, columns: perLayer, title: one ? `${overview.model.name}: ${one.title}` : overview.model.name,
    rowLabels: Array.from({ length: layers }, (_, i) => String(i)),
    columnLabels: Array.from({ length: perLayer }, (_, i) => String(i)),
  };
  if (!one) return { ...base, colour: missing, ink: () => "#000", tip: (i) => `${names[i]}: nothing measured yet` };
  if (one.series) {
    const { series } = one, high = highOf(series);
    const colour = (i) => valueColour(series.values[i], high);
    const reaches = (i) => series.threshold !== null && series.threshold !== undefined && series.values[i] >= series.threshold;
    return { ...base, colour, ink: (i) => inkOn(colour(i)), text: (i) => (reaches(i) ? "•" : ""), tip: (i) => tipOf(one, i) };
  }
  const colour = one.labels
    ? (i) => { const mine = labelled(names[i])[0]; return mine ? kindColour(labels.value.indexOf(mine)) : missing(); }
    : (i) => { const role = firstRole(names[i]); return role ? kindColour(kindIndex(role.kind)) : missing(); };
  const text = one.labels
    ? (i) => labelled(names[i])[0]?.name[0]?.toUpperCase() ?? ""
    : (i) => { const role = firstRole(names[i]), held = rolesOf(names[i]); return role ? kinds[kindIndex(role.kind)]?.letter ?? "" : held?.silent ? "·" : held?.traits.length ? "–" : ""; };
  return { ...base, colour, text, ink: (i) => inkOn(colour(i)), tip: (i) => tipOf(one, i) };
});

// The other atlas's grid, on the same scale, where two are open and a score of both is shown.
export const otherGrid = computed(() => {
  const one = current.value, b = overview.atlases[1];
  const series = one?.group === "Scores" && b?.shape.join() === `${layers},${perLayer}` ? b.series.find((s) => s.name === one.series.name) : null;
  if (!series) return null;
  const high = highOf(one.series), colour = (i) => valueColour(series.values[i], high);
  const reaches = (i) => series.threshold !== null && series.values[i] >= series.threshold;
  return { ...grid.value, title: `${b.name}: ${series.title}`, colour, ink: (i) => inkOn(colour(i)), text: (i) => (reaches(i) ? "•" : ""), tip: (i) => `${names[i]} in ${b.name}: ${plusMinus(series.values[i], series.stderr[i], series.n)} ${series.unit}` };
});

export { kinds, number };
