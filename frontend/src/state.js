// What the page shows: the overview it came with, and what was asked since. Every view reads these signals.
import { computed, signal } from "@preact/signals";

export const overview = JSON.parse(document.getElementById("data").textContent);
export const live = overview.live && overview.model.can_ask;
export const { layers, heads: perLayer } = overview.model;
export const names = Array.from({ length: layers * perLayer }, (_, i) => `L${Math.floor(i / perLayer)}H${i % perLayer}`);
export const indexOf = (name) => {
  const [, layer, head] = /^L(\d+)H(\d+)$/.exec(name) ?? [];
  return layer === undefined ? -1 : Number(layer) * perLayer + Number(head);
};

export const prompt = signal(overview.prompts?.[0]?.prompt ?? overview.example ?? "");
export const asked = signal(null); // the prompt that the results below belong to
export const selected = signal(overview.start ?? names[0]);
export const colouring = signal(null); // the id of a colouring, see colourings.js
export const measured = signal([]); // series that were measured from this page
export const predicted = signal(null);
export const explained = signal(null);
export const pattern = signal(null);
export const why = signal(null);
export const carried = signal({}); // features and documents, by what was asked
export const promoted = signal({}); // by head
export const desk = signal({}); // head -> scale
export const chosenEdits = signal({}); // name -> strength
export const rewritten = signal(null);
export const decoded = signal(null);
export const labels = signal(overview.labels ?? []);
export const moment = signal(0); // of the training view
export const atlas = computed(() => overview.atlases[0] ?? null);

export function clearAnswers() {
  for (const one of [predicted, explained, pattern, why, rewritten, decoded]) one.value = null;
}
