// Numbers as people read them.
export function number(x, digits = 2) {
  if (x === null || x === undefined || Number.isNaN(x)) return "n/a";
  const size = Math.abs(x);
  const text = size !== 0 && size < 10 ** -digits ? x.toPrecision(2) : x.toFixed(size >= 100 ? 0 : digits);
  return text.replace("-", "−");
}
export const plusMinus = (value, error, n) =>
  value === null ? "n/a" : error === null || n === 0 || !error ? number(value) : `${number(value)} ± ${number(error, error < 0.01 ? 3 : 2)}`;
export const percent = (p) => (p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
export const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
export const chance = (p) => (p === null || p === undefined ? "not tested" : p < 0.001 ? "< 0.001" : p.toFixed(3));
