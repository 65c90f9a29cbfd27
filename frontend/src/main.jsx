// The explorer's page.
import { render } from "preact";
import { indexOf, live, names, overview, selected } from "./state.js";
import { Card, Grid } from "./heads.jsx";
import { Looks, Prompt } from "./asking.jsx";
import { Decoding, Desk } from "./desk.jsx";
import { Labels } from "./labels.jsx";
import { Training } from "./training.jsx";
import { Forecast } from "./forecast.jsx";
import { count } from "./words.js";
import "./explorer.css";

const goTo = () => { const name = location.hash.slice(1); if (indexOf(name) >= 0 && indexOf(name) < names.length) selected.value = name; };
goTo();
addEventListener("hashchange", goTo);

function Head() {
  const { model, atlases } = overview;
  const million = model.parameters ? ` ${(model.parameters / 1e6).toFixed(model.parameters < 1e7 ? 1 : 0)} million parameters,` : "";
  const kv = model.kv_heads && model.kv_heads !== model.heads ? ` on ${count(model.kv_heads, "key/value head")}` : "";
  return (
    <header>
      <h1>{model.name}</h1>
      <p>{million} {count(model.layers, "layer")} of {count(model.heads, "attention head")}{kv}. {atlases.length ? `Atlas: ${atlases.map((one) => one.name).join(", compared with ")}.` : "No atlas is open."} {live ? "" : "This page is a file: it shows what was measured when it was written."}</p>
    </header>
  );
}

function App() {
  if (!names.length) {
    return <><header><h1>{overview.model.name}</h1><p>This page is a file: it shows what was measured when it was written.</p></header><main id="main" tabIndex={-1}><div class="side"><Forecast /></div></main><footer>manyheads {overview.version}</footer></>;
  }
  return (
    <>
      <a class="skip" href="#main">Skip to the heads</a>
      <Head />
      <main id="main" tabIndex={-1}>
        <div class="side"><Grid />{overview.history ? <Training /> : null}<Labels /></div>
        <div class="side">{live || overview.prompts?.length ? <Prompt /> : null}<Card /><Looks />{live ? <Desk /> : null}{live ? <Decoding /> : null}</div>
      </main>
      <footer>manyheads {overview.version}</footer>
    </>
  );
}

render(<App />, document.getElementById("app"));
