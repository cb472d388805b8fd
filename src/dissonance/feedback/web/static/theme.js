// Set the theme before the first paint; app.js changes it.
(() => {
  let theme = null;
  try { theme = localStorage.getItem("dissonance:theme"); } catch { /* a browser that keeps nothing */ }
  document.documentElement.dataset.theme = theme === "light" || theme === "dark" ? theme : "auto";
})();
