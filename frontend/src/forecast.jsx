// The forecast view: a series with the fan of its forecast, what was forecast in windows of the past, and errors by step.
import { overview } from "./state.js";
import { Section } from "./parts.jsx";
import { kindColour } from "./colours.js";
import uPlot from "uplot";
import { useEffect, useRef, useState } from "preact/hooks";

const axes = (label, time) => {
  const ink = getComputedStyle(document.body).color;
  const axis = { stroke: ink, grid: { stroke: "#8884", width: 1 }, ticks: { stroke: "#8884" } };
  return [time ? axis : { ...axis, label: "steps ahead" }, { ...axis, label, size: 70 }];
};

export function Forecast() {
  const { series, methods, steps, errors } = overview.forecast;
  const [at, setAt] = useState(0), [method, setMethod] = useState(methods[0]);
  const one = series[at];
  return (
    <>
      <Section title="Forecast" about={`The fan runs from the quantile ${one.levels[0]} to ${one.levels[1]}. Before it: what a method forecast in windows of the past, beside what came.`}>
        <label class="field-row">Series{" "}
          <select value={at} onChange={(event) => setAt(Number(event.currentTarget.value))}>{series.map((s, i) => <option key={i} value={i}>{s.name}</option>)}</select></label>
        <label class="field-row">Windows of{" "}
          <select value={method} onChange={(event) => setMethod(event.currentTarget.value)}>{methods.map((name) => <option key={name}>{name}</option>)}</select></label>
        <Fan one={one} method={method} />
      </Section>
      <Section title="Errors by step" about="Mean absolute error in the windows of the past, over all series, in the unit of the series.">
        <Lines steps={steps} errors={errors} />
        <div class="legend">{Object.keys(errors).map((name, i) => <span key={name}><i class="swatch" style={{ background: kindColour(i) }} />{name}</span>)}</div>
      </Section>
    </>
  );
}

function Fan({ one, method }) {
  const place = useRef();
  useEffect(() => {
    const fans = [...one.windows.filter((w) => w.method === method), one.ahead];
    const times = [...new Set([...one.time, ...fans.flatMap((f) => f.time)])].sort((a, b) => a - b);
    const line = (keys, values) => { const known = new Map(keys.map((t, i) => [t, values[i]])); return times.map((t) => known.get(t) ?? null); };
    const parts = (name) => { const known = new Map(fans.flatMap((f) => f.time.map((t, i) => [t, f[name][i]]))); return times.map((t) => known.get(t) ?? null); };
    const time = times.at(-1) > 1e6;
    const plot = new uPlot({
      width: place.current.clientWidth || 600, height: 320, cursor: { show: true }, legend: { show: true }, scales: { x: { time } },
      axes: axes(one.name, time),
      series: [{}, { label: "came", stroke: getComputedStyle(document.body).color, width: 1.5 }, { label: "low", stroke: "#0072b255", width: 1 }, { label: "high", stroke: "#0072b255", width: 1 }, { label: "forecast", stroke: "#0072b2", width: 2 }],
      bands: [{ series: [3, 2], fill: "#0072b233" }],
    }, [times, line(one.time, one.y), parts("low"), parts("high"), parts("point")], place.current);
    return () => plot.destroy();
  }, [one, method]);
  return <div ref={place} class="curve" role="img" aria-label={`${one.name} with its forecast`} />;
}

function Lines({ steps, errors }) {
  const place = useRef();
  useEffect(() => {
    const names = Object.keys(errors);
    const plot = new uPlot({
      width: place.current.clientWidth || 600, height: 220, cursor: { show: false }, legend: { show: false }, scales: { x: { time: false } },
      axes: axes("mean absolute error", false),
      series: [{}, ...names.map((label, i) => ({ label, stroke: kindColour(i), width: 2 }))],
    }, [steps, ...names.map((name) => errors[name])], place.current);
    return () => plot.destroy();
  }, []);
  return <div ref={place} class="curve" role="img" aria-label="Errors by step" />;
}
