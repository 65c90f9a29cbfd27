// The training view: a slider over the moments at which heads were looked at, with the curves beside the grid.
import { colouring, moment, overview } from "./state.js";
import { Section } from "./parts.jsx";
import { number } from "./words.js";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { useEffect, useRef } from "preact/hooks";

export function Training() {
  const { steps, curves, series } = overview.history;
  const last = steps.length - 1, at = Math.min(moment.value, last);
  const go = (i) => {
    moment.value = i;
    if (!colouring.value?.startsWith("Training:")) colouring.value = `Training:${series[0].name}`;
  };
  return (
    <Section title="Training" about="How the heads came to be. Move the slider: the grid shows every head at that moment.">
      <label class="field-row">Update {steps[at]}{" "}
        <input type="range" min="0" max={last} value={at} onInput={(event) => go(Number(event.currentTarget.value))} aria-valuetext={`update ${steps[at]}`} /></label>
      <p>{Object.entries(curves).map(([name, values]) => `${name} ${number(values[at], 3)}`).join(", ")}</p>
      {Object.entries(curves).map(([name, values]) => <Curve key={name} name={name} steps={steps} values={values} at={at} />)}
    </Section>
  );
}

function Curve({ name, steps, values, at }) {
  const place = useRef();
  useEffect(() => {
    const ink = getComputedStyle(document.body).color;
    const axis = { stroke: ink, grid: { stroke: "#8884", width: 1 }, ticks: { stroke: "#8884" } };
    const plot = new uPlot({
      width: place.current.clientWidth || 400, height: 160, legend: { show: false }, cursor: { show: false }, scales: { x: { time: false } },
      axes: [{ ...axis, label: "updates" }, { ...axis, label: name }],
      series: [{}, { stroke: "#0072b2", width: 2 }, { stroke: "#d55e00", width: 0, points: { show: true, size: 10, fill: "#d55e00" } }],
    }, [steps, values, values.map((v, i) => (i === at ? v : null))], place.current);
    return () => plot.destroy();
  }, [at, steps, values]);
  return <div ref={place} class="curve" role="img" aria-label={`${name} over updates`} />;
}
