// Small parts that several views share.
import { jobs, cancel } from "./api.js";
import { number, percent } from "./words.js";

// How a job is: its place in the queue, how far it is, or why it failed.
export function JobState({ kind }) {
  const how = jobs.value[kind];
  if (!how || how.state === "done" || how.state === "cancelled") return null;
  if (how.state === "failed") return <p class="failed" role="alert">{how.sentence}</p>;
  const far = how.total ? ` ${how.done} of ${how.total}` : "";
  const told = how.state === "waiting" ? (how.place ? `Waiting: ${how.place} before it.` : "Waiting.") : `${how.step || "Working"}${far} …`;
  return (
    <p class="busy" role="status">
      {how.total ? <progress value={how.done} max={how.total} aria-label="Progress" /> : null} {told}{" "}
      <button type="button" onClick={() => cancel(kind)}>Cancel</button>
    </p>
  );
}

// Signed bars, longest magnitude first; at most `top` of them.
export function Bars({ rows, top = 12, unit, choose, label }) {
  const shown = [...rows].filter(([, value]) => value !== null).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, top);
  const most = Math.max(1e-12, ...shown.map(([, value]) => Math.abs(value)));
  return (
    <table class="bars" aria-label={label}>
      <thead><tr><th scope="col">{label}</th><th scope="col" class="number">{unit}</th><th scope="col"><span class="hidden">size</span></th></tr></thead>
      <tbody>
        {shown.map(([name, value]) => (
          <tr key={name}>
            <th scope="row">{choose && /^L\d+H\d+$/.test(name) ? <button type="button" class="link" onClick={() => choose(name)}>{name}</button> : name}</th>
            <td class="number">{number(value, 3)}</td>
            <td class="bar-cell"><span class={value < 0 ? "bar minus" : "bar"} style={{ width: `${(100 * Math.abs(value)) / most}%` }} /></td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

// Next tokens with their probabilities; a press chooses one.
export function Next({ rows, choose, chosen, label = "next token", top = 10 }) {
  const most = rows[0]?.p || 1;
  return (
    <table class="bars next" aria-label={label}>
      <thead><tr><th scope="col">{label}</th><th scope="col" class="number">probability</th><th scope="col"><span class="hidden">size</span></th></tr></thead>
      <tbody>
        {rows.slice(0, top).map((row, i) => (
          <tr key={i} class={row.token === chosen ? "chosen" : ""}>
            <th scope="row">{choose ? <button type="button" class="link token" onClick={() => choose(row.token)}>{row.shown}</button> : <span class="token">{row.shown}</span>}</th>
            <td class="number">{percent(row.p)}</td>
            <td class="bar-cell"><span class="bar" style={{ width: `${(100 * row.p) / most}%` }} /></td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

export function Section({ title, children, about, id }) {
  return (
    <section id={id} aria-label={title}>
      <h2>{title}</h2>
      {about ? <p class="about">{about}</p> : null}
      {children}
    </section>
  );
}
