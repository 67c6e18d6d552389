// A picture that the kernel renews in place, and that tells it of keys, clicks and the pointer, in the picture's pixels.
const KEYS = ["ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft", "PageUp", "PageDown", "Home", "End"];

function render({ model, el }) {
  const picture = document.createElement("img");
  picture.tabIndex = 0;
  picture.style.maxWidth = "100%";
  picture.draggable = false;
  el.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves the keys alone
  el.append(picture);

  let address = "";
  const show = () => {
    URL.revokeObjectURL(address);
    address = URL.createObjectURL(new Blob([model.get("content")], { type: "image/png" }));
    picture.src = address;
    picture.alt = model.get("alt");
  };
  const place = (event) => {
    const box = picture.getBoundingClientRect();
    const scale = picture.naturalWidth / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  let waiting = null;
  const point = (where) => {
    if (waiting === null) {
      requestAnimationFrame(() => {
        model.set("pointer", waiting);
        model.save_changes();
        waiting = null;
      });
    }
    waiting = where;
  };
  const press = (event, key) => {
    event.preventDefault();
    event.stopPropagation();
    model.send({ key });
  };

  // ipywidgets gives a slider's handle no name of its own
  picture.addEventListener("load", () => {
    for (const slider of el.closest(".slice-viewer")?.querySelectorAll(".widget-slider") ?? []) {
      const label = slider.querySelector(".widget-label")?.textContent;
      if (label) slider.querySelector("[role=slider]")?.setAttribute("aria-label", label);
    }
  });
  picture.addEventListener("pointermove", (event) => point(place(event)));
  picture.addEventListener("pointerleave", () => point([]));
  picture.addEventListener("click", (event) => model.send({ click: place(event) }));
  picture.addEventListener("keydown", (event) => {
    if (KEYS.includes(event.key)) press(event, event.key);
  });
  picture.addEventListener(
    "wheel",
    (event) => {
      if (document.activeElement === picture) press(event, event.deltaY > 0 ? "ArrowDown" : "ArrowUp");
    },
    { passive: false },
  );
  model.on("change:content", show);
  show();
  return () => {
    model.off("change:content", show);
    URL.revokeObjectURL(address);
  };
}

export default { render };
