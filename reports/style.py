"""The style and the script of the page: light and dark, one column on a phone, tables that scroll and sort."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1b1e; --soft: #5b5b61; --grid: #dedee2; --paper: #fefefe; --box: #f2f5f9; --line: #0173b2;
  --link: #0a5c8f;
  --c0: #0173b2; --c1: #de8f05; --c2: #029e73; --c3: #d55e00; --c4: #cc78bc; --c5: #ca9161; --c6: #fbafe4;
  --c7: #949494; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e9e9ec; --soft: #b3b3ba; --grid: #3a3a42; --paper: #16171a; --box: #212329; --line: #5ab4ec;
  --link: #8cc8f2;
  --c0: #4aa8e0; --c1: #eaa52e; --c2: #2cc296; --c3: #f07d2b; --c4: #dc96cd; --c5: #d9aa80; --c6: #fbafe4;
  --c7: #a9a9a9; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 66rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0.2rem 0; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid var(--grid); padding-top: 0.8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.3rem; }
a { color: var(--link); }
.note, figcaption { font-size: 0.9rem; color: var(--soft); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 0.6rem;
  margin: 0.8rem 0; }
.answer { background: var(--box); border-left: 4px solid var(--line); padding: 0.5rem 0.8rem; }
.answer h2, .next h2 { font-size: 0.85rem; color: var(--soft); margin: 0; border: 0; padding: 0; font-weight: 600; }
.answer p { margin: 0.2rem 0 0; } .answer .big { font-size: 1.3rem; font-weight: 600; line-height: 1.2; }
.next { background: var(--box); padding: 0.5rem 0.8rem; margin: 0.6rem 0; }
.next p { margin: 0.3rem 0; }
.copy { display: flex; gap: 0.5rem; align-items: start; flex-wrap: wrap; }
.flag { white-space: nowrap; }
code { font: 0.85rem/1.45 ui-monospace, monospace; }
.copy code { flex: 1 1 16rem; background: var(--paper); border: 1px solid var(--grid); padding: 0.4rem 0.6rem; }
button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--soft); border-radius: 4px;
  cursor: pointer; }
.copy button { padding: 0.3rem 0.9rem; }
nav ul { padding: 0; margin: 0.6rem 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; list-style: none; }
.scroll { overflow-x: auto; margin: 0.8rem 0; max-width: 100%; overflow-wrap: normal;
  background: linear-gradient(90deg, transparent, var(--paper) 80%) right / 3rem 100% no-repeat local,
    linear-gradient(90deg, transparent, var(--grid)) right / 1rem 100% no-repeat scroll; }
:focus-visible { outline: 3px solid var(--line); outline-offset: 1px; }
table { border-collapse: collapse; font-size: 0.85rem; }
.caption { font-size: 0.85rem; color: var(--soft); margin: 1rem 0 0; } .caption + .scroll { margin-top: 0.2rem; }
th, td { border-bottom: 1px solid var(--grid); padding: 0.25rem 0.7rem 0.25rem 0.2rem; text-align: left;
  white-space: nowrap; }
.number { text-align: right; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; white-space: normal; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
thead button { border: 0; background: none; font-weight: inherit; text-align: inherit; padding: 0; }
[aria-sort=ascending] button::after { content: " \\2191";
  } [aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: 1.2rem 0 1.6rem; }
.panels { display: grid; gap: 0.4rem 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.panels.narrow { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.panels.single { max-width: 40rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.panels svg { width: 100%; height: auto; display: block; max-height: 80rem; }
dt { font-weight: 600; margin-top: 0.5rem; } dd { margin: 0 0 0 1rem; }
@media print { .copy button { display: none; } }
"""

SCRIPT = """
for (const button of document.querySelectorAll(".copy button")) {
  button.hidden = !navigator.clipboard && !document.execCommand;
  button.onclick = () => {
    const code = button.previousElementSibling;
    getSelection().selectAllChildren(code);
    const done = () => { button.textContent = "Copied"; };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done);
    else if (document.execCommand("copy")) done();
  };
}
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, i) => row.cells[i].textContent.replace(/[,<]/g, "");
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(each => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const x = value(a, i), y = value(b, i), d = parseFloat(x) - parseFloat(y);
        return isNaN(d) ? x.localeCompare(y) : d;
      });
      body.append(...(down ? rows.reverse() : rows));
    };
  });
}
"""
