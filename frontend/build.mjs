// Bundles src/ into the package: one script and one style, which are committed, so that users need no Node.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";

const sources = readdirSync("src").sort().map((name) => readFileSync(`src/${name}`));
const lock = readFileSync("package-lock.json");
const mark = createHash("sha256").update(Buffer.concat([...sources, lock])).digest("hex").slice(0, 16);

await build({
  entryPoints: { explorer: "src/main.jsx" },
  outdir: "../src/manyheads/explorer/static",
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  charset: "utf8",
  legalComments: "none",
  jsx: "automatic",
  jsxImportSource: "preact",
  banner: {
    js: `/* manyheads explorer, built from ${mark}. Contains preact, @preact/signals and uPlot, all under the MIT licence. */`,
    css: `/* manyheads explorer, built from ${mark} */`,
  },
});
