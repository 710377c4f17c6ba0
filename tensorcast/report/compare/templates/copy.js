"use strict";
// A button to copy each block of commands.
(() => {
  document.querySelectorAll("pre").forEach((block) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(block.textContent);
      } catch { // a page opened from disk may not: select the text instead
        getSelection().selectAllChildren(block);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1200);
    });
    block.before(button);
  });
})();
