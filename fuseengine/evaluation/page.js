"use strict";

// Tables: a head cell's button sorts the rows of each body by data-value, missing values last.
function valueOf(row, column) {
  const cell = row.cells[column];
  const number = cell.dataset.value;
  if (number === undefined) return cell.textContent.trim();
  return number === "" ? null : Number(number);
}

function compare(x, y) {
  if (typeof x === "string") return x.localeCompare(y, undefined, { numeric: true });
  return x - y;
}

function sortBy(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const sorted = head.getAttribute("aria-sort");
  const first = head.dataset.first || "ascending";
  const second = first === "ascending" ? "descending" : "ascending";
  const order = sorted === first ? second : first;
  for (const other of head.parentElement.cells) {
    if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  }
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
    const keyed = rows.map((row) => [valueOf(row, column), row]);
    keyed.sort(([x], [y]) => {
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * compare(x, y);
    });
    body.append(...keyed.map(([, row]) => row));
  }
}

for (const head of document.querySelectorAll("th[aria-sort]")) {
  head.querySelector("button").addEventListener("click", () => sortBy(head));
}

// Table of images: one method or all.
const filter = document.getElementById("method");
if (filter) {
  filter.addEventListener("change", () => {
    for (const row of document.querySelectorAll("#images tbody tr")) {
      row.hidden = filter.value !== "" && row.dataset.method !== filter.value;
    }
  });
}

// Pairs: two pictures one over the other, the left one cut off at the divider.
const chosen = { left: document.getElementById("left"), right: document.getElementById("right") };

function fill(article) {
  const pictures = article.querySelectorAll(".strip img");
  const stage = article.querySelector(".stage");
  const labels = {};
  for (const side of ["left", "right"]) {
    const index = Number(chosen[side].value);
    labels[side] = chosen[side].options[chosen[side].selectedIndex].text;
    const image = stage.querySelector(`img.${side}`);
    image.src = pictures[index].src;
    image.alt = pictures[index].alt;
    stage.querySelector(`.of-${side}`).textContent = labels[side];
  }
  const slider = stage.querySelector("input");
  slider.setAttribute(
    "aria-label", `${article.dataset.name}: divider, ${labels.left} left, ${labels.right} right`);
}

function makeStage(article) {
  const first = article.querySelector(".strip img");
  const stage = document.getElementById("stage").content.cloneNode(true).firstElementChild;
  for (const image of stage.querySelectorAll("img")) {
    image.width = first.width;
    image.height = first.height;
    image.decoding = "async";
  }
  const slider = stage.querySelector("input");
  const move = () => {
    stage.style.setProperty("--at", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${Math.round(slider.value)} %`);
  };
  slider.addEventListener("input", move);
  const viewer = article.querySelector(".viewer");
  viewer.classList.add("live");
  viewer.prepend(stage);
  move();
  fill(article);
}

if (chosen.left) {
  const live = new Set();
  // A page may hold hundreds of pairs: a stage is made when its pair comes near.
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || live.has(entry.target)) continue;
      live.add(entry.target);
      watch.unobserve(entry.target);
      makeStage(entry.target);
    }
  }, { rootMargin: "600px" });
  for (const article of document.querySelectorAll("article")) watch.observe(article);
  for (const side of ["left", "right"]) {
    chosen[side].addEventListener("change", () => live.forEach(fill));
  }
}
