"use strict";

// What every report's page does: light or dark, tables that sort, figures that enlarge. Each report has this script first.

const find = (id) => document.getElementById(id);

// ---- light and dark -------------------------------------------------------------------------

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function nameTheme() {
  find("theme").textContent = isDark() ? "Light" : "Dark";
}

function toggleTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
  try {
    localStorage.setItem("report-theme", document.documentElement.dataset.theme);
  } catch {
    // Some browsers store nothing for local files: the choice then lasts until the page is closed.
  }
}

function recallTheme() {
  try {
    const theme = localStorage.getItem("report-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // See toggleTheme.
  }
  nameTheme();
}

// ---- tables ---------------------------------------------------------------------------------

function sortValue(cell) {
  if (!cell) return null;
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  if (["", "–", "-"].includes(text)) return null;
  const number = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?/i.exec(text); // "7.10 ±0.20" sorts by 7.10
  return number ? Number(number[0]) : text;
}

function compareValues(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortTable(header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = header.closest("table").tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, value: sortValue(row.cells[header.cellIndex]) }));
  const given = rows.filter(({ value }) => value !== null);
  given.sort((a, b) => (descending ? compareValues(b.value, a.value) : compareValues(a.value, b.value)));
  const absent = rows.filter(({ value }) => value === null); // last in both directions
  body.append(...[...given, ...absent].map(({ row }) => row));
}

// ---- figures --------------------------------------------------------------------------------

function enlargeFigure(button) {
  const image = button.querySelector("img");
  find("enlarged-image").src = image.src;
  find("enlarged-image").alt = image.alt;
  find("enlarged-title").textContent = button.closest("figure").querySelector("figcaption").textContent;
  find("enlarged").showModal();
}

// ---- start ----------------------------------------------------------------------------------

function listenToPage() {
  find("theme").addEventListener("click", toggleTheme);
  for (const button of document.querySelectorAll(".sortable th button")) {
    button.addEventListener("click", () => sortTable(button.parentElement));
  }
  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => enlargeFigure(button));
  }
  find("enlarged").addEventListener("click", () => find("enlarged").close());
}

recallTheme(); // before the rest, which may be many megabytes, so that a dark page does not begin light
document.addEventListener("DOMContentLoaded", listenToPage);
