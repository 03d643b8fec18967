// The memory of every rung, from the numbers that the table of the page has.
(function () {
  const answer = document.getElementById("answer");
  const table = document.querySelector("#ladder table");
  if (!answer || !table) return;
  const value = (id) => Number(document.getElementById(id).value) || 0;
  const size = (bytes) => {
    const gib = bytes / 2 ** 30;
    return gib >= 1 ? gib.toFixed(1) + " GiB" : (bytes / 2 ** 20).toFixed(0) + " MiB";
  };
  function show() {
    const rows = value("rows"), vocabulary = value("vocabulary"), hidden = value("hidden");
    const bytes = value("bytes"), chunk = Math.min(value("chunk") * 2 ** 20, 8 * rows * vocabulary);
    const lines = [...table.querySelectorAll("tbody tr")].map((line) => {
      const [call, logits, entries, chunks] = [...line.cells].map((cell) => cell.textContent.trim());
      const total =
        Number(logits) * rows * vocabulary * bytes +
        Number(entries) * rows * value("k") * 8 +
        Number(chunks) * (chunk + (4 * vocabulary + rows * bytes) * hidden);
      return "<li><code>" + call + "</code>: " + size(total) + "</li>";
    });
    answer.innerHTML = "<ul>" + lines.join("") + "</ul>";
  }
  document.getElementById("calculator").addEventListener("input", show);
  show();
})();
