// Matrices as pictures: drawn on a canvas for speed, written as SVG or PNG to be kept.
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

// A matrix: rows, columns, colour(i) of cell i, text(i) on it (or ""), ink(i), labels of rows and columns, title, unit.
export function draw(canvas, matrix, cell, ratio = devicePixelRatio || 1) {
  const { rows, columns } = matrix;
  canvas.width = Math.round(columns * cell * ratio);
  canvas.height = Math.round(rows * cell * ratio);
  const pen = canvas.getContext("2d");
  const gap = cell >= 8 ? ratio : 0;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `600 ${Math.round(cell * 0.5 * ratio)}px system-ui, sans-serif`;
  for (let i = 0; i < rows * columns; i++) {
    const x = (i % columns) * cell * ratio, y = Math.floor(i / columns) * cell * ratio;
    pen.fillStyle = matrix.colour(i);
    pen.fillRect(Math.round(x), Math.round(y), Math.ceil(cell * ratio - gap), Math.ceil(cell * ratio - gap));
    const text = cell >= 13 ? matrix.text?.(i) : "";
    if (text) {
      pen.fillStyle = matrix.ink(i);
      pen.fillText(text, x + (cell * ratio) / 2, y + (cell * ratio) / 2 + ratio);
    }
  }
}

export function svg(matrix, cell = 16) {
  const { rows, columns, title, rowLabels, columnLabels } = matrix;
  const widest = (labels) => Math.max(0, ...labels.map((label) => label.length)) * 6.2 + 10;
  const left = widest(rowLabels), top = 40 + (columnLabels.some((label) => label.length > 3) ? widest(columnLabels) : 14);
  const slanted = columnLabels.some((label) => label.length > 3);
  const parts = [`<text x="4" y="18" font-size="13" font-weight="600">${escaped(title)}</text>`];
  for (let i = 0; i < rows * columns; i++) {
    const x = left + (i % columns) * cell, y = top + Math.floor(i / columns) * cell;
    parts.push(`<rect x="${x}" y="${y}" width="${cell - 1}" height="${cell - 1}" fill="${matrix.colour(i)}"><title>${escaped(matrix.tip(i))}</title></rect>`);
    const text = matrix.text?.(i);
    if (text) parts.push(`<text x="${x + cell / 2}" y="${y + cell * 0.7}" text-anchor="middle" font-size="${cell * 0.55}" fill="${matrix.ink(i)}">${escaped(text)}</text>`);
  }
  rowLabels.forEach((label, i) => parts.push(`<text x="${left - 4}" y="${top + i * cell + cell * 0.7}" text-anchor="end">${escaped(label)}</text>`));
  columnLabels.forEach((label, i) => {
    const x = left + i * cell + cell / 2;
    parts.push(slanted ? `<text transform="translate(${x + 3},${top - 5}) rotate(-90)">${escaped(label)}</text>` : `<text x="${x}" y="${top - 5}" text-anchor="middle">${escaped(label)}</text>`);
  });
  const width = left + columns * cell + 8, height = top + rows * cell + 8;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" font-size="10" fill="#222"><rect width="100%" height="100%" fill="#fff"/>${parts.join("")}</svg>`;
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 5000);
}

export const saveSvg = (matrix, name) => save(new Blob([svg(matrix)], { type: "image/svg+xml" }), `${name}.svg`);

export async function savePng(matrix, name) {
  const picture = new Image();
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg(matrix))}`;
  await picture.decode();
  const canvas = document.createElement("canvas");
  canvas.width = picture.width * 2;
  canvas.height = picture.height * 2;
  const pen = canvas.getContext("2d");
  pen.scale(2, 2);
  pen.drawImage(picture, 0, 0);
  canvas.toBlob((blob) => save(blob, `${name}.png`), "image/png");
}
