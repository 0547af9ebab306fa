"use strict";
// The attention maps of the stays that diverge most, each drawn as it comes near the screen, and all of them for print.
(() => {
  const waiting = new Set(document.querySelectorAll("[data-map]"));
  const drawNow = (element) => {
    if (!waiting.delete(element)) return;
    near.unobserve(element);
    trajlm.attentionMap(element).update(trajlm.shared.maps[element.dataset.map], element.dataset.map, Infinity);
  };
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawNow(entry.target)),
    { rootMargin: "600px" },
  );
  for (const element of waiting) {
    element.style.minHeight = "520px"; // nothing moves when it comes
    near.observe(element);
  }
  window.addEventListener("beforeprint", () => { for (const element of [...waiting]) drawNow(element); });
})();
