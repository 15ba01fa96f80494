// Runs before the first paint, so that the page never flashes in a different theme than the stored one.
try {
  const theme = localStorage.getItem("lorry-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be blocked; the theme of the system then applies.
}
