// A button that asks the kernel for a file and hands it to the browser as a download, whatever its size.
function render({ model, el }) {
  const button = document.createElement("button");
  const said = document.createElement("span");
  button.className = "jupyter-button";
  said.setAttribute("role", "status");
  button.textContent = model.get("label");
  button.addEventListener("click", () => {
    said.textContent = " Preparing the file …";
    model.send({ wanted: true });
  });
  const answer = (message, buffers) => {
    said.textContent = message.said ? ` ${message.said}` : "";
    if (!message.name) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([buffers[0]], { type: "application/octet-stream" }));
    link.download = message.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  model.on("msg:custom", answer);
  el.append(button, said);
  return () => model.off("msg:custom", answer);
}

export default { render };
