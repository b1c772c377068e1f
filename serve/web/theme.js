// Runs before the first paint, so that the page never flashes in the other theme.
try {
  const chosen = localStorage.getItem("llmlite.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing for this page: the system's theme it is.
}
