// Assistant's additions to the admin: copy buttons, the one-time key page, the log that stays at its end.

// navigator.clipboard exists on https and localhost only; elsewhere the old way must do.
async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = document.createElement("textarea");
  area.value = text;
  area.style.position = "fixed";
  area.style.opacity = "0";
  document.body.appendChild(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const source = document.querySelector(button.dataset.copy);
  await copyText(source.value ?? source.textContent);
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1500);
});

document.addEventListener("DOMContentLoaded", () => {
  // The key stands in the page once; the examples take it from there. The address becomes the key's own page, so that a
  // reload shows its prefix and does not post the form again.
  const secret = document.querySelector("[data-key-text]");
  if (secret) {
    for (const example of document.querySelectorAll("[data-key-example]")) {
      example.textContent = example.textContent.replaceAll("$ASSISTANT_API_KEY", secret.value);
    }
    history.replaceState(null, "", secret.dataset.keyPage);
    secret.select();
  }
  toEnd(document);
});

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-submits]") && event.target.value) event.target.form.submit();
});

// A log opens at its end and follows what is written. While its reader has scrolled up or selects something, it waits.
function toEnd(part) {
  for (const log of part.querySelectorAll("[data-log]")) log.scrollTop = log.scrollHeight;
}
function isRead(log) {
  const selection = document.getSelection();
  const selects = !selection.isCollapsed && log.contains(selection.anchorNode);
  return selects || log.scrollHeight - log.scrollTop - log.clientHeight >= 40;
}
document.addEventListener("htmx:beforeSwap", (event) => {
  const log = event.target.querySelector("[data-log]");
  if (!log) return;
  // Without a log in the answer the session has ended: let the page say so.
  if (!event.detail.xhr.responseText.includes("data-log")) window.location.reload();
  if (isRead(log) || !event.detail.xhr.responseText.includes("data-log")) event.detail.shouldSwap = false;
});
document.addEventListener("htmx:afterSettle", (event) => toEnd(event.target));
document.addEventListener("toggle", (event) => toEnd(event.target), true);
