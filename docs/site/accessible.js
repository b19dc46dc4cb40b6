// What the theme leaves out for those who use a keyboard or a screen reader.
addEventListener("load", () => {
  document.querySelector(".md-search[role=dialog]")?.setAttribute("aria-label", "Search");
  // Wide code and tables scroll sideways; the keyboard can only scroll what it can reach.
  for (const box of document.querySelectorAll("pre code, .md-typeset__scrollwrap, .md-typeset__table")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
