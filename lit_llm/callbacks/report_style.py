"""How the report looks. Colours are told apart in both themes and by most colour-blind readers."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#5b6472;--rule:#e1e5eb;--code:#f0f2f5;
--student:#1f62d0;--teacher:#b4540a;--start:#747d8c;--good:#13795b;--bad:#b3261e;--warn:#8a5a00;
--above:31 98 208;--below:196 92 10;
--c1:#1f62d0;--c2:#b4540a;--c3:#0b8468;--c4:#a32b87;--c5:#6f6200;--c6:#6a55d8;--c7:#c0392b;--c8:#3f7f93}
@media (prefers-color-scheme:dark){:root{--page:#12151a;--card:#1a1e25;--ink:#e6e9ee;--soft:#9aa4b2;--rule:#2c323c;
--code:#14181e;--student:#74a9ff;--teacher:#f7a35c;--start:#8b95a5;--good:#4fd0a5;--bad:#ff8a80;--warn:#f0c060;
--above:58 112 205;--below:176 92 20;
--c1:#74a9ff;--c2:#f7a35c;--c3:#43c8a3;--c4:#ea86d2;--c5:#d2c14f;--c6:#ab9dff;--c7:#ff8a7a;--c8:#7cc4d8}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1120px;padding:28px 20px 64px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:2px 0 0;font-size:30px;line-height:1.2;letter-spacing:-.01em;display:flex;flex-wrap:wrap;align-items:center;gap:12px}
h2{margin:40px 0 12px;font-size:20px}
h3{margin:22px 0 8px;font-size:15px}
h4{margin:0 0 4px;font-size:12px;font-weight:600;color:var(--soft)}
small{font-weight:400;color:var(--soft);font-size:13px}
p{margin:6px 0}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:6px 0;padding:12px 14px;background:var(--code);border:1px solid var(--rule);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere}
.where,.note,.missing{color:var(--soft);font-size:13px}
.missing{padding:12px 14px;border:1px dashed var(--rule);border-radius:8px}
.error{color:var(--bad);overflow-wrap:anywhere}
.models{font-size:16px;color:var(--soft);overflow-wrap:anywhere}
.models b{font-weight:600}
.student{color:var(--student)}.teacher{color:var(--teacher)}.start{color:var(--start)}
.status{font-size:12px;font-weight:600;letter-spacing:0;padding:3px 10px;border-radius:99px;border:1px solid currentColor}
.finished{color:var(--good)}.failed{color:var(--bad)}.interrupted,.running{color:var(--warn)}
.facts{display:flex;flex-wrap:wrap;gap:10px 28px;margin:18px 0 0}
.facts dt{font-size:12px;color:var(--soft)}.facts dd{margin:0;font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:18px;padding-top:12px;border-top:1px solid var(--rule)}
nav a{color:var(--soft);text-decoration:none;padding:4px 0}nav a:hover{color:var(--ink);text-decoration:underline}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:10px}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:9px 14px;border-top:1px solid var(--rule);vertical-align:top}
tr:first-child th,tr:first-child td{border-top:0}
tbody th{font-weight:400}
.headline tbody tr:first-child>*{border-top:1px solid var(--rule)}
.headline th,.headline td{white-space:nowrap}
.headline td{font-variant-numeric:tabular-nums}
.headline td:nth-child(3){font-weight:700}
.headline thead th{font-size:13px;font-weight:600}
.headline th small{display:block;font-size:12px}
.plain th{color:var(--soft);width:120px}.plain td{overflow-wrap:anywhere}
.bar{display:inline-block;width:110px;height:8px;margin-right:6px;border-radius:9px;background:var(--rule);overflow:hidden}
.bar i{display:block;height:100%;background:var(--student)}
.figures{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}
figure{margin:0;padding:14px 14px 8px;background:var(--card);border:1px solid var(--rule);border-radius:10px;
display:flex;flex-direction:column}
figcaption{font-weight:600}
figure svg{width:100%;height:auto;display:block;margin-top:auto}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:4px 0 8px;padding:0;font-size:12.5px;color:var(--soft)}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:16px;border-top:2.5px solid;margin-right:6px;vertical-align:middle}
.legend i.dashed{border-top-style:dashed;border-top-width:2px}
.grid{stroke:var(--rule)}.tick{fill:var(--soft);font-size:11px;font-family:inherit}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.faint{fill:none;stroke-width:1;opacity:.28}
.level{stroke-width:1.5;stroke-dasharray:5 4}
article{margin:0 0 14px;padding:14px;background:var(--card);border:1px solid var(--rule);border-radius:10px}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 12px;padding-left:10px;border-left:3px solid var(--rule);
color:var(--soft);font-size:13.5px}
.answers{display:grid;gap:14px 22px;grid-template-columns:repeat(auto-fit,minmax(min(100%,210px),1fr))}
.answers p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px}
.answers i{color:var(--soft)}
h4.student{color:var(--student)}h4.teacher{color:var(--teacher)}
.heat{--ground:var(--above);margin:0 0 12px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px;line-height:1.75}
.heat span{background:rgb(var(--ground)/var(--x));padding:1px 0;border-radius:2px}
.heat .below{--ground:var(--below);border-bottom:2px dotted}
.scale{font-size:13px;color:var(--soft)}.scale b{color:var(--ink)}
.ramp{display:inline-block;width:120px;height:10px;border-radius:5px;vertical-align:middle;
background:linear-gradient(90deg,rgb(var(--above)/0),rgb(var(--above)/.6))}
.ramp.signed{background:linear-gradient(90deg,rgb(var(--below)/.6),rgb(var(--below)/0) 50%,rgb(var(--above)/0) 50%,rgb(var(--above)/.6))}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft);font-size:13px}
details ol{list-style:none;margin:8px 0 0;padding:0;font-size:13.5px}
details li{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0}details li b{color:var(--soft);font-weight:600;margin-right:6px}
@media (max-width:560px){body{padding:20px 14px 48px}h1{font-size:25px}th,td{padding:8px 8px}.bar{display:none}
.headline{font-size:13px}.headline thead th{font-size:12px;white-space:normal}.headline tbody th{white-space:normal;min-width:84px}
.facts{display:grid;grid-template-columns:1fr 1fr}}
"""
