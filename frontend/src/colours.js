// Colour scales that colour-blind readers can tell apart, for light and dark pages.
const dark = matchMedia("(prefers-color-scheme: dark)");
export const onTheme = (then) => dark.addEventListener("change", then);

const RAMPS = {
  light: { up: ["#f2f5f9", "#9dc3e6", "#3f7fbf", "#0b3c78"], down: ["#f2f5f9", "#f5b98a", "#d9762b", "#8a3d05"], none: "#d5d9de" },
  dark: { up: ["#1a2028", "#24507e", "#4b8fd6", "#b8dcff"], down: ["#1a2028", "#6e3d16", "#cf7a35", "#ffd2a8"], none: "#30363d" },
};
// Okabe and Ito's colours: told apart by people with any kind of colour vision.
const KINDS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b3a50a", "#7d6fc4", "#8c564b", "#5f7d8c", "#a0508c"];

const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function along(ramp, x) {
  const at = Math.min(Math.max(x, 0), 1) * (ramp.length - 1);
  const i = Math.min(Math.floor(at), ramp.length - 2);
  const [a, b] = [parts(ramp[i]), parts(ramp[i + 1])];
  return `rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * (at - i))).join(",")})`;
}
const ramps = () => RAMPS[dark.matches ? "dark" : "light"];
export const missing = () => ramps().none;
export const kindColour = (i) => KINDS[i % KINDS.length];

// A value's colour: from 0 up to `high`; below 0 in the other hue, down to -high.
export function valueColour(value, high) {
  if (value === null || value === undefined) return missing();
  const x = high ? value / high : 0;
  return x < 0 ? along(ramps().down, -x) : along(ramps().up, x);
}
export const gradient = (low) => {
  const { up, down } = ramps();
  const stops = low < 0 ? [...[...down].reverse(), ...up.slice(1)] : up;
  return `linear-gradient(to right, ${stops.join(", ")})`;
};
// Black or white text, whichever is easier to read on a colour.
export function inkOn(colour) {
  const [r, g, b] = colour.startsWith("#") ? parts(colour) : colour.match(/\d+/g).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff";
}
