// Names and stops for keyboard and screen reader that the theme's own script leaves out.
"use strict";
const named = () => {
  document.querySelectorAll('.md-search[role="dialog"]:not([aria-label])').forEach((box) => box.setAttribute("aria-label", "Search"));
  document.querySelectorAll("nav.md-code__nav:not([aria-label])").forEach((bar) => {
    const every = [...document.querySelectorAll("nav.md-code__nav")];
    bar.setAttribute("aria-label", `Code block ${every.indexOf(bar) + 1}`);
  });
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((wrap) => {
    if (wrap.scrollWidth > wrap.clientWidth) wrap.setAttribute("tabindex", "0");
  });
};
named();
new MutationObserver(named).observe(document.body, { childList: true, subtree: true });
