// What the pages do beyond links and forms. Without this file they work all the same.
"use strict";

// A citation opens its passage and takes the focus there.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  const place = link && document.getElementById(decodeURIComponent(link.hash.slice(1)));
  const closed = place && place.closest("details");
  if (closed) {
    closed.open = true;
    place.focus({ preventScroll: true });
  }
});

// "Copy as JSON".
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const field = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(field.value);
  } catch {
    field.select(); // no clipboard outside secure pages: it is selected, to be copied by hand
    return;
  }
  const said = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = said; }, 1500);
});

// Control and Enter in a text field asks.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("form.ask textarea")) {
    event.target.form.requestSubmit();
  }
});

// An error from the server is shown where the answer would be.
document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.xhr.status >= 400) event.detail.shouldSwap = true;
});
