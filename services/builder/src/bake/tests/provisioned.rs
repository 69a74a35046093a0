//! Images made by playbooks: real ones, by a real ansible-playbook.

use super::*;

/// As roles are published: with defaults, handlers, templates and facts, for whoever has sudo or is root.
const ROLE: [(&str, &str); 4] = [
    ("defaults/main.yml", "greeting: nothing\nworkers: 1\n"),
    (
        "tasks/main.yml",
        "- name: the server
  apt: { name: nginx-light, update_cache: true }
- name: its user
  user: { name: deploy, system: true, shell: /usr/sbin/nologin, home: /srv/deploy }
- name: its page
  template: { src: index.html.j2, dest: /var/www/html/index.html, owner: deploy, mode: '0640' }
  notify: reload nginx
- name: its workers
  lineinfile: { path: /etc/nginx/nginx.conf, regexp: '^worker_processes', line: 'worker_processes {{ workers }};' }
  notify: reload nginx
- name: what runs
  service: { name: nginx, state: started, enabled: true }
- name: as somebody else
  shell: { cmd: 'id -un >/srv/deploy/who', creates: /srv/deploy/who }
  become: true
  become_user: deploy
",
    ),
    ("handlers/main.yml", "- name: reload nginx\n  service: { name: nginx, state: reloaded }\n"),
    ("templates/index.html.j2", "{{ greeting }} from {{ inventory_hostname }}, {{ ansible_distribution_release }}"),
];
const PLAYBOOK: &str = "- hosts: all\n  become: true\n  roles: [web]\n";

fn step(vars: &str) -> String {
    format!(
        "  from: {{ debian: bookworm }}\n  steps:\n    - ansible: {{ playbook: ansible/site.yml, {vars} }}"
    )
}

fn write(kitchen: &Kitchen, path: &str, content: &str) {
    let path = kitchen.folder.path().join("context").join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_playbook_makes_an_image_and_nothing_of_ansible_stays() {
    let kitchen = Kitchen::new("be000009", BakeLimits::default());
    write(&kitchen, "ansible/site.yml", PLAYBOOK);
    for (path, content) in ROLE {
        write(&kitchen, &format!("ansible/roles/web/{path}"), content);
    }
    let definition = step("vars: { greeting: Hello, workers: 3 }, idempotent: true");
    let resolution = kitchen.lock(&definition, None, None).await;
    let image = kitchen.bake(&resolution.lock, 1).await;
    assert_eq!(kitchen.read(&image, "var/www/html/index.html").unwrap(), "Hello from web, bookworm");
    assert_eq!(kitchen.read(&image, "srv/deploy/who").unwrap(), "deploy\n");
    assert!(kitchen.read(&image, "etc/nginx/nginx.conf").unwrap().contains("worker_processes 3;"));
    only_nginx_is_added(&kitchen, &image, &["ansible", "python", "socat"]);

    // Nothing has changed, and nobody is asked.
    let pinned = kitchen.lock(&definition, None, Some(&resolution.lock)).await;
    assert_eq!((pinned.lock == resolution.lock, pinned.release_files), (true, None));
    let cached = kitchen.bake(&resolution.lock, 2).await;
    assert!(cached.steps.iter().all(|step| step.cached) && cached.digest == image.digest);

    what_is_in_force_stays(&kitchen, &resolution.lock, &image).await;

    for (playbook, vars, wanted) in [
        ("- hosts: db\n  tasks: []\n", "idempotent: false", "hosts: all"),
        ("- hosts: all\n  tasks: [{ command: 'false' }]\n", "idempotent: false", "status"),
        ("- hosts: all\n  tasks: [{ command: 'true' }]\n", "idempotent: true", "second run"),
        (
            "- hosts: all\n  tasks: [{ apt: { name: no-such-package } }]\n",
            "idempotent: false",
            "no-such-package",
        ),
        // Neither the network nor the machine is there.
        (
            "- hosts: all\n  tasks: [{ wait_for: { host: 192.0.2.1, port: 80, timeout: 3 } }]\n",
            "idempotent: false",
            "192.0.2.1",
        ),
    ] {
        write(&kitchen, "ansible/site.yml", playbook);
        let lock = kitchen.lock(&step(vars), None, Some(&resolution.lock)).await.lock;
        let failed = kitchen.baker.bake(&lock, kitchen.run(3)).await.unwrap_err();
        let BakeError::Step { why, last_lines, .. } = &failed else { panic!("{failed}") };
        let said = format!("{why}\n{}", last_lines.join("\n"));
        assert!(said.contains(wanted), "{playbook}: {said}");
        kitchen.assert_nothing_is_left();
    }
}

/// An archive that has moved on elsewhere is no reason to run a playbook again; that the playbook is run in another way is.
async fn what_is_in_force_stays(kitchen: &Kitchen, lock: &Lock, image: &BakedImage) {
    let snapshot_of = |lock: &Lock| match lock.steps.as_slice() {
        [LockedStep::Provision(provision)] => provision.snapshot,
        steps => panic!("{steps:?}"),
    };
    // As if the archive had said something else when the image was made.
    let (now, then) = (snapshot_of(lock), Digest::of(b"then"));
    let snapshots = kitchen.folder.path().join("builder/snapshots");
    fs::create_dir(snapshots.join(then.hex())).unwrap();
    for file in fs::read_dir(snapshots.join(now.hex())).unwrap().map(Result::unwrap) {
        fs::copy(file.path(), snapshots.join(then.hex()).join(file.file_name())).unwrap();
    }
    let mut in_force = lock.clone();
    let [LockedStep::Provision(provision)] = in_force.steps.as_mut_slice() else { panic!("{in_force:?}") };
    provision.snapshot = then;
    let resolve = async |vars: &str, image| {
        let current = Some(Current { lock: in_force.clone(), image });
        let definition = step(&format!("vars: {{ {vars} }}, idempotent: true"));
        kitchen.resolve(&definition, None, None, current).await.unwrap().lock
    };
    assert_eq!(resolve("greeting: Hello, workers: 3", image.digest).await, in_force);
    assert_eq!(snapshot_of(&resolve("greeting: Hello, workers: 4", image.digest).await), now);
    // Nobody can tell what is in an image that is gone.
    assert_eq!(resolve("greeting: Hello, workers: 3", Digest::of(b"gone")).await, *lock);
}

/// Nothing is installed that is of the program, and no file has such a name.
fn only_nginx_is_added(kitchen: &Kitchen, image: &BakedImage, words: &[&str]) {
    let status = kitchen.read(image, "var/lib/dpkg/status").unwrap();
    assert!(status.contains("Package: nginx-light\nStatus: install ok installed"));
    let is_left = |name: &str| name.contains("kiln") || words.iter().any(|word| name.contains(word));
    let installed = status.lines().filter_map(|line| line.strip_prefix("Package: "));
    assert_eq!(installed.filter(|name| is_left(name)).collect::<Vec<_>>(), Vec::<&str>::new());
    let layer = kitchen.store().layer_tree(&image.layers.last().unwrap().digest).unwrap();
    let files: Vec<String> = walk(&layer).into_iter().filter(|path| is_left(path)).collect();
    assert_eq!(files, Vec::<String>::new());
    kitchen.assert_nothing_is_left();
}

/// Every path below a folder.
fn walk(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            found.push(item.path().display().to_string());
            if item.file_type().unwrap().is_dir() {
                folders.push(item.path());
            }
        }
    }
    let top = format!("{}/", folder.display());
    found.into_iter().map(|path| path.trim_start_matches(&top).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_makes_an_image_and_nothing_of_puppet_stays() {
    let kitchen = Kitchen::new("be00000a", BakeLimits::default());
    for (path, content) in [
        ("site.pp", "node 'web' { include page }\n"),
        ("hiera.yaml", "version: 5\nhierarchy: [{ name: all, path: common.yaml }]\n"),
        ("data/common.yaml", "page::greeting: Hello\n"),
        (
            "modules/page/manifests/init.pp",
            "class page(String $greeting) {
  package { 'nginx-light': ensure => installed }
  -> file { '/var/www/html/index.html': content => epp('page/index.epp', { 'greeting' => $greeting }), mode => '0640' }
  ~> service { 'nginx': ensure => running, enable => true }
  user { 'deploy': ensure => present, shell => '/usr/sbin/nologin', system => true }
}
",
        ),
        ("modules/page/templates/index.epp", "<%= $greeting %> from <%= $facts['os']['distro']['codename'] %>"),
    ] {
        write(&kitchen, &format!("puppet/{path}"), content);
    }
    let step = |options: &str| {
        format!(
            "  from: {{ debian: bookworm }}\n  steps:\n    - puppet: {{ manifest: puppet/site.pp, {options} }}"
        )
    };
    let resolution = kitchen.lock(&step("idempotent: true"), None, None).await;
    let image = kitchen.bake(&resolution.lock, 1).await;
    assert_eq!(kitchen.read(&image, "var/www/html/index.html").unwrap(), "Hello from bookworm");
    assert!(kitchen.read(&image, "etc/passwd").unwrap().contains("deploy:"));
    only_nginx_is_added(&kitchen, &image, &["puppet", "ruby", "facter", "socat"]);

    for (manifest, options, wanted) in [
        ("exec { '/bin/false': }\n", "idempotent: false", "status"),
        ("exec { '/bin/true': }\n", "idempotent: true", "second run"),
        ("include nowhere\n", "idempotent: false", "nowhere"),
    ] {
        write(&kitchen, "puppet/site.pp", manifest);
        let lock = kitchen.lock(&step(options), None, Some(&resolution.lock)).await.lock;
        let failed = kitchen.baker.bake(&lock, kitchen.run(3)).await.unwrap_err();
        let BakeError::Step { why, last_lines, .. } = &failed else { panic!("{failed}") };
        let said = format!("{why}\n{}", last_lines.join("\n"));
        assert!(said.contains(wanted), "{manifest}: {said}");
        kitchen.assert_nothing_is_left();
    }
}
