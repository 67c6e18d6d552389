// A file goes to the kernel in pieces, each asked for by the kernel: no message is ever large, and none gets lost.
const PIECE = 4 * 1024 * 1024;

function render({ model, el }) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const said = document.createElement("div");
  const show = () => {
    label.textContent = `${model.get("label")} `;
    label.append(input);
    said.textContent = model.get("said");
    input.disabled = model.get("disabled");
  };
  let file = null;
  let number = 0;
  input.type = "file";
  input.accept = model.get("accept");
  said.setAttribute("role", "status");
  input.addEventListener("click", () => { input.value = ""; });
  input.addEventListener("change", () => {
    file = input.files[0];
    number += 1;
    if (file) model.send({ begin: number, name: file.name, size: file.size });
  });
  const answer = async (message) => {
    if (message.number !== number || !file) return;
    try {
      const piece = await file.slice(message.next, message.next + PIECE).arrayBuffer();
      model.send({ piece: number }, undefined, [piece]);
    } catch (error) {
      model.send({ unreadable: number });
    }
  };
  model.on("msg:custom", answer);
  model.on("change:label change:said change:disabled", show);
  show();
  el.append(label, said);
  return () => model.off("msg:custom", answer);
}

export default { render };
