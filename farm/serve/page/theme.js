// Before anything is drawn, so that nothing flashes: the colours chosen last time.
try {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
} catch {} // storage is switched off in this browser
