// The script of discover.py's report, behind report_page.js: a link to a proposal opens what it is folded into.

function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  for (let place = target; place; place = place.parentElement) {
    if (place.tagName === "DETAILS") place.open = true;
  }
  target.scrollIntoView();
}

window.addEventListener("hashchange", openTarget);
document.addEventListener("DOMContentLoaded", openTarget);
