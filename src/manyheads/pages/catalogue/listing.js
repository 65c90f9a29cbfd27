
(() => {
  // Narrows the list of methods: every word must begin a word of the entry; room and state must be the chosen ones.
  const fields = document.querySelector(".narrow");
  if (!fields) return;
  fields.hidden = false;
  const [text, room, state] = ["text", "room", "state"].map((name) => fields.querySelector(`[data-narrow="${name}"]`));
  const entries = [...document.querySelectorAll("ul.methods > li")].map((node) => [node, ` ${node.textContent.toLowerCase()}`]);
  const narrow = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [node, said] of entries) {
      const fits = (!room.value || node.dataset.room === room.value) && (!state.value || node.dataset.state === state.value)
        && words.every((word) => said.search(new RegExp(`[^\\p{L}\\p{N}]${word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}`, "u")) >= 0);
      node.hidden = !fits;
      shown += fits;
    }
    fields.querySelector(".narrowed").textContent = shown ? `${shown} of ${entries.length} methods` : "No method has all these words; try fewer.";
  };
  for (const field of [text, room, state]) field.addEventListener("input", narrow);
  narrow();
})();
