// A matrix that one can point at, walk through by arrow keys, and choose a cell of.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { draw, savePng, saveSvg } from "./figures.js";
import { onTheme } from "./colours.js";

export function Matrix({ matrix, chosen, choose, largest = 44, least = 4, label, name, showRows = true, gutter: wide = 30 }) {
  const canvas = useRef(), frame = useRef();
  const [width, setWidth] = useState(0);
  const [here, setHere] = useState(null);
  const [theme, redraw] = useState(0);
  const { rows, columns } = matrix;
  const gutter = showRows ? wide : 0;
  const cell = width ? Math.max(least, Math.min(largest, Math.floor((width - gutter) / columns))) : 0;

  useLayoutEffect(() => {
    setWidth(frame.current.clientWidth); // before the first paint, so that nothing jumps
    const watch = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    watch.observe(frame.current);
    return () => watch.disconnect();
  }, []);
  useEffect(() => onTheme(() => redraw((n) => n + 1)), []);
  useEffect(() => { if (cell) draw(canvas.current, matrix, cell); }, [matrix, cell, theme]);

  const at = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / cell), row = Math.floor((event.clientY - box.top) / cell);
    return row < 0 || column < 0 || row >= rows || column >= columns ? null : row * columns + column;
  };
  const press = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -1e9, End: 1e9 }[event.key];
    if (by !== undefined) {
      event.preventDefault();
      const from = here ?? chosen ?? 0;
      const next = here === null && chosen === null ? 0 : from + by;
      setHere(Math.abs(by) === 1e9 ? (by < 0 ? 0 : rows * columns - 1) : next < 0 || next >= rows * columns ? from : next);
    } else if ((event.key === "Enter" || event.key === " ") && here !== null) {
      event.preventDefault();
      choose?.(here);
    } else if (event.key === "Escape") setHere(null);
  };
  const mark = (i, kind) =>
    i !== null && i >= 0 && cell > 0 && (
      <span class={`mark ${kind}`} style={{ left: `${(i % columns) * cell}px`, top: `${Math.floor(i / columns) * cell}px`, width: `${cell}px`, height: `${cell}px` }} />
    );
  const every = Math.max(1, Math.ceil(11 / Math.max(cell, 1)));
  return (
    <figure class="matrix" ref={frame}>
      <div class="plot" style={{ paddingLeft: `${gutter}px`, height: cell ? `${rows * cell + 16}px` : `${rows * 8}px` }}>
        {showRows && cell > 0 && matrix.rowLabels.map((text, i) => i % every === 0 && <span class="row-label" style={{ top: `${i * cell + cell / 2}px`, width: `${gutter - 4}px` }}>{text}</span>)}
        <div
          class="field" tabIndex={0} role="application" aria-label={`${label}. Arrow keys move, Enter chooses.`}
          style={{ width: `${columns * cell}px`, height: `${rows * cell}px` }}
          onPointerMove={(event) => setHere(at(event))} onPointerLeave={() => setHere(null)}
          onClick={(event) => { const i = at(event); if (i !== null) choose?.(i); }}
          onKeyDown={press} onBlur={() => setHere(null)}
        >
          <canvas ref={canvas} aria-hidden="true" style={{ width: `${columns * cell}px`, height: `${rows * cell}px` }} />
          {mark(chosen ?? null, "chosen")}
          {mark(here, "here")}
        </div>
        {cell > 0 && matrix.columnLabels.length > 0 && (
          <div class="column-labels" style={{ left: `${gutter}px`, width: `${columns * cell}px` }}>
            {matrix.columnLabels.map((text, i) => i % Math.max(1, Math.ceil(18 / cell)) === 0 && <span style={{ left: `${i * cell}px`, width: `${cell}px` }}>{text}</span>)}
          </div>
        )}
      </div>
      <figcaption>
        <output class="tip" aria-live="polite">{here === null ? matrix.hint ?? "Point at a cell, or walk with the arrow keys." : matrix.tip(here)}</output>
        <span class="save">
          Save as <button type="button" onClick={() => saveSvg(matrix, name)}>SVG</button>
          <button type="button" onClick={() => savePng(matrix, name)}>PNG</button>
        </span>
      </figcaption>
    </figure>
  );
}
