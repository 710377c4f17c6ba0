// A button below each figure that saves it as a picture: with its title, in the colours of the theme.
(() => {
  const SCALE = 3; // pixels per point
  document.querySelectorAll("figure").forEach((figure) => {
    const shown = figure.querySelector(".plot svg");
    const button = Object.assign(document.createElement("button"), { type: "button", className: "save", textContent: "Save as PNG" });
    button.setAttribute("aria-label", `Save as PNG: ${figure.querySelector("h2").textContent}`);
    button.addEventListener("click", () => {
      const { y, width, height } = shown.viewBox.baseVal; // the title is above what is shown
      const whole = shown.cloneNode(true);
      const size = { width, height: y + height, viewBox: `0 0 ${width} ${y + height}`, "stroke-linejoin": "round" };
      Object.entries(size).forEach(([name, value]) => whole.setAttribute(name, value));
      const theme = getComputedStyle(document.documentElement);
      const text = new XMLSerializer().serializeToString(whole).replace(/var\((--\w+)\)/g, (_, name) => theme.getPropertyValue(name).trim());
      const picture = new Image();
      picture.addEventListener("load", () => {
        const sheet = Object.assign(document.createElement("canvas"), { width: SCALE * width, height: SCALE * (y + height) });
        sheet.getContext("2d").drawImage(picture, 0, 0, sheet.width, sheet.height);
        Object.assign(document.createElement("a"), { href: sheet.toDataURL(), download: `${figure.id.replace("figure-", "")}.png` }).click();
      });
      picture.src = `data:image/svg+xml,${encodeURIComponent(text)}`;
    });
    figure.querySelector("figcaption").append(button);
  });
})();
