"use strict";
const form = document.querySelector(".controls"), slider = form.elements.slice, said = form.querySelector("output");
const sections = [...document.querySelectorAll("section[data-subject]")];
const subjects = JSON.parse(document.getElementById("areas").textContent);
const places = subjects.map(subject => subject.start);
let current = 0;

function area(mm2) {
  return mm2 < 100 ? `${mm2} mm²` : `${(mm2 / 100).toFixed(1)} cm²`;
}

function chosen(name) {
  return new FormData(form).getAll(name);
}

function showSlice() {
  const subject = subjects[current], section = sections[current], place = slider.valueAsNumber - subject.first;
  places[current] = slider.valueAsNumber;
  section.style.setProperty("--column", place % subject.columns);
  section.style.setProperty("--row", Math.floor(place / subject.columns));
  const lesion = subject.truth[place] ? `lesion ${area(subject.truth[place])}` : "no lesion";
  said.textContent = `${slider.value} of ${subject.first} to ${subject.last}, ${lesion}`;
  slider.setAttribute("aria-valuetext", `slice ${said.textContent}`);
  for (const line of section.querySelectorAll(".areas")) {
    const marked = subject.marked[line.dataset.areas], hits = subject.hits[line.dataset.areas];
    line.textContent = !marked ? `Slice ${slider.value}, ${lesion}.`
      : marked[place] ? `Marked ${area(marked[place])}, ${area(hits[place])} of it lesion.` : "Nothing marked.";
  }
  for (const picture of section.querySelectorAll(".window")) {
    picture.setAttribute("aria-label", `${picture.dataset.what} of ${subject.id}, axial slice ${slider.value}`);
  }
}

function show() {
  current = Number(chosen("subject")[0]);
  const methods = chosen("method"), outlines = chosen("outline");
  sections.forEach((section, i) => { section.hidden = i !== current; });
  for (const figure of document.querySelectorAll("figure[data-method]")) {
    figure.hidden = !methods.includes(figure.dataset.method);
  }
  for (const layer of document.querySelectorAll(".layer[data-outline]")) {
    layer.hidden = !outlines.includes(layer.dataset.outline);
  }
  [slider.min, slider.max] = [subjects[current].first, subjects[current].last];
  slider.value = places[current];
  showSlice();
}

slider.addEventListener("input", showSlice);
form.addEventListener("change", show);
form.addEventListener("submit", event => event.preventDefault());
form.hidden = false;
show();
